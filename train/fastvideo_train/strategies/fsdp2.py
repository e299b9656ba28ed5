"""Parts of weights on every process by PyTorch's FSDP2, replicated over "data" (HSDP).

`fully_shard` cuts each layer of a network, then the rest of it, along the first axis of every
parameter: (R, ...) -> (r, ...). A layer's weights are gathered in its own forward and backward in
the dtype that it computes in, and its gradients come back in float32, averaged and cut. The parts
are float32 masters, so that optimizer, average and clip are those of the other strategies, on
parts; Muon alone gathers a matrix for its update, which is then that of the whole matrix.

The few parameters that compute in float32 in a network that does not (time embedder, tables, norms)
stay whole on every process: FSDP2 casts all parameters of a layer alike.

Networks that start from something are built on meta, and each process reads its own rows of them:
it holds no more of a network, at any time, than these and one tensor. Only new weights are whole in
host memory at first, see `roles.build`.

Frozen denoisers and text encoders are cut too. Alone there is nothing to cut: one process trains as
`single` does, and reads and writes the same checkpoints as many.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.parallel.mesh import Meshes
from fastvideo_train.optim import Optimizer, Rows
from fastvideo_train.recipe import OptimSpec, Recipe
from fastvideo_train.roles import CUT_WHEN_FROZEN, Role
from fastvideo_train.strategies._masters import (
    Masters,
    Trained,
    change_flat,
    outline_of,
    with_weights,
)

OLDEST_TORCH = (2, 13)
CALLS = {"dit": ("features",), "vae": ("encode_moments", "decode"), "decoder": ("decode",)}
"""Functions beside `forward` that methods call on a learning network."""


class _Parts(Trained):
    """One learning role, of which this process holds rows."""

    def _place(self, role: Role) -> dict[str, Tensor]:
        for name, param in role.net.named_parameters():
            if not param.requires_grad:
                param.data = param.data.to(role.compute_dtype(name))
        cut(role, self.meshes)
        params = role.net.named_parameters()
        return {n: self.local(p.detach()) for n, p in params if p.requires_grad}

    def _copies(self) -> list[str]:
        return []  # FSDP2 casts what it gathers

    def _optimizer(self, spec: OptimSpec, rows: Rows | None = None) -> Optimizer:
        shapes = {n: tuple(p.shape) for n, p in self.params.items()}
        own = Rows(shapes, self._whole_rows, self._own_rows)
        optimizer = super()._optimizer(spec, own)
        assert all(isinstance(self.params[n], DTensor) for n in optimizer.muon_names), "cut"
        if optimizer.adamw is not None:  # there from the start, so that a checkpoint finds it
            for param in (p for g in optimizer.adamw.param_groups for p in g["params"]):
                optimizer.adamw.state[param] = {
                    "step": torch.zeros((), device=param.device),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
        return optimizer

    def local(self, tensor: Tensor) -> Tensor:
        """Return this process's rows."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def leaf(self, name: str, local: Tensor) -> Tensor:
        """Return rows as a part of the whole."""
        like = self.params[name]
        return _of_whole(local, like, like.shape) if isinstance(like, DTensor) else local

    def whole(self, name: str, local: Tensor) -> Tensor:
        """Return the whole of a tensor shaped like a parameter; all processes together."""
        leaf = self.leaf(name, local)
        return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf

    def part(self, like: Tensor, tensor: Tensor) -> Tensor:
        """Return this process's rows of a leaf, which another strategy may have stored whole."""
        if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
            return self.local(tensor)
        return _rows(tensor, like).clone()

    def norm(self) -> Tensor:
        """Return the norm of the whole gradient."""
        square = {True: torch.zeros((), device=self.meshes.device)}
        square[False] = square[True].clone()
        for name, grad in self.grads.items():
            square[isinstance(self.params[name], DTensor)] += grad.square().sum()
        axis = self.meshes.axis("weights")
        if axis.group is not None:
            dist.all_reduce(square[True], group=axis.group)
        return (square[True] + square[False]).sqrt()

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state, rows as parts of the whole."""
        state = self.optimizer.state_dict()
        muon = {}
        for key, rows in state["muon"].items():
            columns = int(key.partition("x")[2])
            shape = torch.Size((len(rows), int(key.partition("x")[0]), columns))
            muon[key] = _of_whole(rows, self._like, shape, dim=1)
        return {"adamw": self._each(state["adamw"], self.leaf), "muon": muon}

    def own_optimizer_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the state with this process's rows alone."""
        own = {
            key: self.local(t) if isinstance(t, DTensor) else _rows(t, self._like, dim=1).clone()
            for key, t in state["muon"].items()
        }
        adamw = self._each(state["adamw"], lambda name, t: self.part(self.params[name], t))
        return {"adamw": adamw, "muon": own}

    def _each(self, adamw: Mapping[str, Any], change: Any) -> dict[str, Any]:
        """Change the moments of AdamW; its counts of steps are no parts of anything."""
        names = self.optimizer.adamw_names
        moments = {
            i: {k: t if k == "step" else change(names[i], t) for k, t in values.items()}
            for i, values in adamw.get("state", {}).items()
        }
        return {**adamw, "state": moments} if adamw else {}

    @property
    def _like(self) -> DTensor:
        return next(p for p in self.params.values() if isinstance(p, DTensor))

    def _whole_rows(self, x_rC: Tensor, shape: tuple[int, int]) -> Tensor:
        whole: Tensor = _of_whole(x_rC, self._like, torch.Size(shape)).full_tensor()
        return whole

    def _own_rows(self, x_RC: Tensor) -> Tensor:
        return _rows(x_RC, self._like)


class Strategy(Masters):
    """Trains roles of which every process holds parts."""

    def __init__(self, recipe: Recipe, meshes: Meshes | None = None) -> None:
        super().__init__(recipe, meshes)
        self.is_alone = self.meshes.degrees.world_size == 1
        self.trained = Trained if self.is_alone else _Parts
        self._outlines: dict[str, nn.Module] = {}

    @classmethod
    def check(cls, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Refuse what is not served."""
        super().check(recipe, degrees)
        version = tuple(int(x) for x in torch.__version__.split(".")[:2])
        if version < OLDEST_TORCH and degrees.world_size > 1:
            raise ValueError(
                f"run.strategy 'fsdp2' needs torch 2.13 or newer, not {torch.__version__}: only"
                " there FSDP2 was seen to find the tokens that layers hand on; use accelerate"
            )
        if recipe.run.compile and degrees.world_size > 1:
            raise ValueError(
                "run.compile must be false under strategy 'fsdp2': a compiled network does not wait"
                " for the weights of its layers"
            )

    @property
    def first_device(self) -> str:
        """Where networks are built: no process need hold them whole."""
        return super().first_device if self.is_alone else "meta"

    def prepare(self, roles: Mapping[str, Role]) -> None:
        """Cut every network that is worth it, and take over the learning ones."""
        if not self.is_alone:
            # Layers hand on what they were given, which FSDP2 sees as views; nobody writes to it.
            warnings.filterwarnings("ignore", "FSDP2-wrapped .* a view", UserWarning)
            is_cut = {  # stored text states are a network without numbers
                n: r.trainable or (r.kind in CUT_WHEN_FROZEN and r.num_params() > 0)
                for n, r in roles.items()
            }
            for name, role in roles.items():
                read(role, self.meshes, _whole(role) if is_cut[name] else None)
            self._outlines = {n: outline_of(r.net) for n, r in roles.items() if is_cut[n]}
            for name, role in roles.items():
                if not is_cut[name]:
                    role.net.to(self.meshes.device)
                elif not role.trainable:
                    cut(role, self.meshes)
        super().prepare(roles)

    def _back_propagate(self, roles: Sequence[str], loss: Tensor) -> None:
        if self.is_alone:
            return super()._back_propagate(roles, loss)
        # Replicas meet once an update. Of roles that this loss is not for they meet at once: a sum
        # that waits would leak into their next update, while their gradients are dropped here.
        for name, one in self._trained.items():
            is_last = one.num_micro + 1 == self.recipe.run.accumulate
            one.net.set_requires_all_reduce(is_last or name not in roles)  # type: ignore[operator]
        torch.autograd.backward(loss)  # what it reaches are gathered weights, which come and go
        for name in self._trained.keys() - set(roles):
            for param in self._trained[name].params.values():
                param.grad = None

    def reduce(self, one: Trained) -> None:
        """Average the gradients of whole parameters; FSDP2 has averaged the others."""
        if self.is_alone:
            return
        whole = [g for n, g in one.grads.items() if not isinstance(one.params[n], DTensor)]
        change_flat(whole, self._mean)

    def _mean(self, flat: Tensor) -> Tensor:
        dist.all_reduce(flat)
        return flat / self.meshes.degrees.world_size

    @contextmanager
    def averaged(self) -> Iterator[Mapping[str, Role]]:
        """Yield roles with whole networks, averaged where they learn, on the first process."""
        if self.is_alone:
            with super().averaged() as roles:
                yield roles
            return
        yield {
            name: self._gathered(role) if name in self._outlines else role
            for name, role in self.roles.items()
        }

    @torch.no_grad()
    def _gathered(self, role: Role) -> Role:
        """Return a role with a plain copy of its network; off the first process with its own."""
        one = self._trained.get(role.name)
        weights = {}
        for name, param in role.net.named_parameters():
            if one is not None and name in one.learned:
                whole = one.whole(name, one.learned[name])
            else:
                whole = param.full_tensor() if isinstance(param, DTensor) else param.detach()
            if self.meshes.is_first:
                weights[name] = whole.to(role.compute_dtype(name))
        return with_weights(self._outlines[role.name], role, weights) if weights else role

    def close(self) -> None:
        """Take the process groups out of the mesh, which DTensor's caches keep for ever."""
        if not self.is_alone:
            self.meshes.replicas_by_weights._pg_registry.clear()


def _whole(role: Role) -> set[str]:
    """Return what a cut network has whole: what is float32 in it, and what a method froze, which
    is saved whole.
    """
    is_saved = role.trainable and not role.base
    return {
        name
        for name, param in role.net.named_parameters()
        if role.compute_dtype(name) != role.dtype or (is_saved and not param.requires_grad)
    }


@torch.no_grad()
def read(role: Role, meshes: Meshes, names: Collection[str] | None = None) -> None:
    """Give parameters on meta, all or some, their first weights; cut ones this process's rows."""
    params, late = dict(role.net.named_parameters()), []
    unread = role.unread.tensors
    for name in [name for name in unread if names is None or name in names]:
        like, first = params[name], unread.pop(name)
        own = _rows(first, like) if isinstance(like, DTensor) else first
        if own.is_meta:
            late.append(name)
            real = torch.empty_like(own, dtype=like.dtype, device=meshes.device)
        else:
            real = own.to(meshes.device, like.dtype, copy=True)
        real = _of_whole(real, like, like.shape) if isinstance(like, DTensor) else real
        owner, _, last = name.rpartition(".")  # one by one: FSDP2 copies rows that it must pad
        role.net.get_submodule(owner).load_state_dict({last: real}, strict=False, assign=True)
    params = dict(role.net.named_parameters())
    role.unread.read_into({name: params[name].detach() for name in late})


def cut(role: Role, meshes: Meshes) -> None:
    """Cut a network over processes: each of its layers, then the rest of it; read what it lacks."""
    net, params = role.net, dict(role.net.named_parameters())
    whole = {p for n, p in params.items() if role.compute_dtype(n) != role.dtype}
    for param in whole:
        param.data = param.data.to(meshes.device)
    is_low = role.trainable and role.dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=role.dtype if is_low else None,
        reduce_dtype=torch.float32 if is_low else None,
        cast_forward_inputs=False,  # times are float32
    )
    how: dict[str, Any] = {"mesh": _mesh(meshes), "mp_policy": policy, "ignored_params": whole}
    for layer in _layers(role):
        fully_shard(layer, **how)
    fully_shard(net, **how)
    calls = CALLS.get(role.kind, ())
    if role.kind == "dit" and meshes.axis("sequence").size > 1:
        calls = ("embed", "head")  # what `parallel.sequence` calls in place of `forward`
    for call in calls:
        register_fsdp_forward_method(net, call)
    read(role, meshes)


def _layers(role: Role) -> list[nn.Module]:
    """Return the repeated layers of a denoiser or a text encoder, which are called one by one."""
    if role.kind not in CUT_WHEN_FROZEN:
        return []
    lists = (m for m in role.net.modules() if isinstance(m, nn.ModuleList))
    return list(next((m for m in lists if len({type(x) for x in m}) == 1), ()))


def _mesh(meshes: Meshes) -> DeviceMesh:
    mesh = meshes.replicas_by_weights
    return mesh["weights"] if meshes.degrees.data == 1 else mesh


def _of_whole(local: Tensor, like: DTensor, shape: torch.Size, *, dim: int = 0) -> DTensor:
    """Return rows as a part of a tensor of `shape`, cut along `dim` as `like` is along its first.

    It shares the memory of `local`.
    """
    places = [Shard(dim) if p.is_shard() else p for p in like.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, like.device_mesh, places, run_check=False, shape=shape, stride=stride
    )


def _rows(whole: Tensor, like: DTensor, *, dim: int = 0) -> Tensor:
    """Return this process's rows of a whole tensor; the last processes may have none."""
    axis = next(i for i, p in enumerate(like.placements) if p.is_shard())
    parts = whole.chunk(like.device_mesh.size(axis), dim)
    place = like.device_mesh.get_local_rank(axis)
    return parts[place] if place < len(parts) else whole.narrow(dim, 0, 0)
