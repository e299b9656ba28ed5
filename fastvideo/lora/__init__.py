"""LoRAs in a network's weights: merged in float32 at any strength, taken out again bit for bit.

loras = Loras()
loras.use(net, [Use(Path("style.safetensors"), 0.8), Use(Path("motion.safetensors"), 0.5)])
loras.use(net, [])  # the weights that it had before

Merged, a LoRA costs nothing while a clip is made; the weights that it changed are kept on the CPU.
Threads may share the network: a claim keeps LoRAs in the weights while an iterator is open.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from fastvideo import foreign, hub
from fastvideo.formats import wan
from fastvideo.log import logger
from fastvideo.lora.file import Entry, LoraFile, read, some
from fastvideo.sampling import LoraUse

_WHOLE = ("diff", "diff_b", "diff_m")


@dataclass(frozen=True)
class Use:
    """A file and how strongly it counts; another `hash` is another file of the same name."""

    path: Path
    strength: float = 1.0
    hash: str = ""


@dataclass(frozen=True)
class Change:
    """What a file adds to one parameter: scale * up @ down, or `whole`."""

    whole: Tensor | None = None
    up_Or: Tensor | None = None
    down_rI: Tensor | None = None
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the parameters that it fits."""
        if self.whole is not None:
            return tuple(self.whole.shape)
        assert self.up_Or is not None and self.down_rI is not None, "a change is one of the two"
        return len(self.up_Or), *self.down_rI.shape[1:]

    def times(self, strength: float, like: Tensor) -> Tensor:
        """Return strength * change in the dtype, on the device and in the shape of `like`."""

        def ready(tensor: Tensor) -> Tensor:
            return tensor.to(like.device, like.dtype)

        if self.whole is not None:
            return ready(self.whole) * (strength * self.scale)
        assert self.up_Or is not None and self.down_rI is not None, "a change is one of the two"
        product = ready(self.up_Or).flatten(1) @ ready(self.down_rI).flatten(1)
        return product.reshape(like.shape) * (strength * self.scale)


Part = tuple[float, Change]
"""A change and its strength."""
Fits = dict[tuple[Path, str], str]
"""What of each file (its path and hash) was not applied."""


@dataclass(frozen=True)
class Fit:
    """How a file fits a network: changes by parameter, and the modules that found none.

    text: modules of a text encoder, which are never applied.
    """

    path: Path
    changes: Mapping[str, tuple[Change, ...]]
    matched: tuple[str, ...]
    unmatched: tuple[str, ...] = ()
    text: tuple[str, ...] = ()

    @property
    def lacking(self) -> str:
        """Return the names of what was not applied; empty if the whole file was."""
        texts = [f"{len(self.text)} modules of a text encoder"] if self.text else []
        return "; ".join([*([some(list(self.unmatched))] if self.unmatched else []), *texts])

    def describe(self) -> str:
        """Return one line: how many modules were applied, and the names of those that were not."""
        total = len(self.matched) + len(self.unmatched)
        line = f"{len(self.matched)} of {total} modules of {self.path.name} are applied"
        if self.unmatched:
            line += f"; this network has no {some(list(self.unmatched))}"
        if self.text:
            line += f"; {len(self.text)} modules of a text encoder are not applied"
        return line


def fit(file: LoraFile, net: nn.Module) -> Fit:
    """Find the parameters that a file changes; a partial fit is legal, and `Fit` names the rest.

    Raises `ValueError` if no module is found, or shapes differ, or two names mean one module.
    """
    params = {name: tuple(p.shape) for name, p in net.named_parameters()}
    stems = spellings(params)
    changes: dict[str, list[Change]] = {}
    seen: dict[tuple[str, str], str] = {}
    matched: dict[str, None] = {}
    unmatched, wrong = [], []
    for module, entry in file.modules.items():
        for kind, change in _changes(entry).items():
            name = _parameter(module, kind, stems, params)
            if name is None:
                unmatched.append(f"{module}.{kind}" if _spelled(module, stems) else module)
                continue
            if (name, kind) in seen:
                raise ValueError(f"{file.path} has {module} twice, also as {seen[name, kind]}")
            seen[name, kind] = module
            matched[module] = None
            changes.setdefault(name, []).append(change)
            if change.shape != params[name]:
                wrong.append(f"{module} adds {change.shape} to {params[name]}")
    if wrong:
        raise ValueError(
            f"{file.path} does not fit the network; {len(wrong)} mis-shaped: {some(wrong)}"
        )
    if not matched:
        raise ValueError(_no_match(file, unmatched))
    whole = {name: tuple(parts) for name, parts in changes.items()}
    return Fit(file.path, whole, tuple(matched), tuple(dict.fromkeys(unmatched)), file.text)


def spellings(params: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return {spelling: stem} for the modules (and tables) of these parameters.

    A stem is a parameter's name less `.weight` or `.bias`; its spellings are ours (diffusers'),
    that of the original Wan, and both with underscores for points.
    """
    table = wan.names("dit")
    found: dict[str, str] = {}
    for name in params:
        stem = _stem(name)
        original = table.to_original(name)
        for spelling in (stem, *([_stem(original)] if original else [])):
            for key in (spelling, spelling.replace(".", "_")):
                assert found.setdefault(key, stem) == stem, f"{key} means {found[key]} and {stem}"
    return found


def _spelled(module: str, stems: Mapping[str, str]) -> str | None:
    """Return the stem that a module's name means, whatever it has for points."""
    return stems.get(module, stems.get(module.replace(".", "_")))


@dataclass(eq=False)
class Claim:
    """Keeps the weights as they are until its last reference is gone, however an iterator ends.

    thread: the last one that computed an item, in which waiting for the end would never end.
    """

    thread: int


class Loras:
    """The LoRAs that are in one network's weights now, and what those weights were.

    While a claim is held, a call that needs other LoRAs waits if it is in another
    thread; in the same one, where it would wait for itself, it raises `ValueError`. Iterators of
    equal LoRAs never wait for each other's end, nor behind others that do.
    """

    def __init__(self) -> None:
        self.active: tuple[Use, ...] | None = ()
        self._kept: dict[str, Tensor] = {}
        self._fits: Fits = {}
        self._lock = threading.RLock()  # held while weights change, and while an item is computed
        self._claims: list[weakref.ref[Claim]] = []

    def use(self, net: nn.Module, uses: Sequence[Use]) -> None:
        """Set the weights to what they were, plus strength * change of every use, rounded once.

        Nothing happens if they are so already. Raises `ValueError` for a file that does not fit,
        before any weight is changed. A strength of 0 changes no bit.
        """
        self.claim(net, uses)  # and drop it

    def check(self, net: nn.Module, uses: Sequence[Use]) -> None:
        """Raise `ValueError` for a file that does not fit; nothing is merged."""
        wanted = _nonzero(uses)
        if wanted != self.active:
            collect(wanted, net, known=self._fits)

    def claim(self, net: nn.Module, uses: Sequence[Use]) -> Claim:
        """Put LoRAs into the weights, where they stay until no reference to the claim is left.

        It waits while an open claim of another thread needs others. Raises `ValueError` for one of
        the same thread, and for a file that does not fit.
        """
        wanted = _nonzero(uses)
        while True:
            # Garbage collection may end a claim in any thread, even one that holds the lock: what
            # it calls must not wait, and `put` never does.
            ended: SimpleQueue[object] = SimpleQueue()
            with self._lock:
                ends = [] if wanted == self.active else self._open(ended.put)
                if not ends:
                    self._merge(net, wanted)
                    self._claims = [ref for ref in self._claims if ref() is not None]
                    claim = Claim(threading.get_ident())
                    self._claims.append(weakref.ref(claim))
                    return claim
                if threading.get_ident() in (thread for thread, _ in ends):
                    raise ValueError(
                        f"LoRAs {_words(wanted)} differ from {_words(self.active or ())}, which an"
                        " open iterator of this thread needs; finish, close() or drop it first"
                    )
            ended.get()

    def lacking(self, use: Use) -> str:
        """Return what of a file that was used is not applied, as the network has no such module."""
        return self._fits.get((use.path, use.hash), "")

    def turn(self, claim: Claim) -> AbstractContextManager[bool]:
        """Return the lock to hold while an item is computed, never between two."""
        claim.thread = threading.get_ident()
        return self._lock

    def _open(self, report: Callable[[object], None]) -> list[tuple[int, weakref.ref[Claim]]]:
        """Return each claim's thread, and a weak reference that calls `report` at its end.

        Not the claims: a traceback that held one would keep it open.
        """
        claims = (ref() for ref in self._claims)
        return [(claim.thread, weakref.ref(claim, report)) for claim in claims if claim is not None]

    def _merge(self, net: nn.Module, wanted: tuple[Use, ...]) -> None:
        if wanted == self.active:
            return
        changes, params = collect(wanted, net, known=self._fits), dict(net.named_parameters())
        self.active = None  # until it is known: a second interrupt may leave the way back half done
        try:
            self._apply(params, changes)
            self.active = wanted
        except BaseException:  # an interrupt or no memory: half of a LoRA is none
            self._apply(params, {})
            self.active = ()
            raise

    @torch.no_grad()
    def _apply(self, params: Mapping[str, Tensor], changes: Mapping[str, Sequence[Part]]) -> None:
        for name in [*self._kept]:
            if name not in changes:
                params[name].copy_(self._kept[name])
                del self._kept[name]
        for name, parts in changes.items():
            if name not in self._kept:
                self._kept[name] = params[name].detach().to("cpu", copy=True)
            params[name].copy_(merged(self._kept[name].to(params[name].device), parts))


def uses_of(loras: Iterable[LoraUse]) -> list[Use]:
    """Find the files of the LoRAs of a request."""
    return [Use(hub.find_lora(one.path), one.strength, one.hash) for one in loras]


def collect(
    uses: Sequence[Use], net: nn.Module, *, known: Fits | None = None
) -> dict[str, list[Part]]:
    """Return what files add to each parameter of a network, in order; log how each file fits.

    `net` may be on the meta device. known: what files lack that need no log line, which grows.
    Raises `ValueError` for a file that cannot be read or does not fit.
    """
    known = {} if known is None else known
    parts: dict[str, list[Part]] = {}
    for use in uses:
        if not math.isfinite(use.strength):
            raise ValueError(f"strength {use.strength} of {use.path} must be a finite number")
        file = read(use.path)
        found = fit(file, net)
        if (use.path, use.hash) not in known:
            known[use.path, use.hash] = found.lacking
            (logger.warning if found.lacking else logger.info)("LoRA: %s", found.describe())
            foreign.warn(file.unknown_keys, source=use.path)
        for name, changes in found.changes.items():
            parts.setdefault(name, []).extend((use.strength, change) for change in changes)
    return parts


def merged(weight: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return weight + strength * change of every part, added in float32 and rounded once."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for strength, change in parts:
        total = total + change.times(strength, total)
    return total.to(weight.dtype)


def _nonzero(uses: Sequence[Use]) -> tuple[Use, ...]:
    return tuple(use for use in uses if use.strength != 0)


def _words(uses: Sequence[Use]) -> str:
    return f"({', '.join(f'{use.path.name}:{use.strength:g}' for use in uses) or 'none'})"


def _changes(entry: Entry) -> dict[str, Change]:
    """Return what a module's tensors add, by kind."""
    tensors, scale = entry.tensors, entry.scale
    found = {kind: Change(whole=tensors[kind]) for kind in _WHOLE if kind in tensors}
    if "up" in tensors:
        found["lora"] = Change(up_Or=tensors["up"], down_rI=tensors["down"], scale=scale)
    if "up_bias" in tensors:
        found["up_bias"] = Change(whole=tensors["up_bias"], scale=scale)
    return found


def _parameter(
    module: str, kind: str, stems: Mapping[str, str], params: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Return the parameter that a change of this kind is for; None if the network has none."""
    if kind == "diff_m":  # said of the module that owns the table
        return _spelled(f"{module}.modulation", stems)
    stem = _spelled(module, stems)
    if stem is None:
        return None
    name = f"{stem}.bias" if kind in ("diff_b", "up_bias") else f"{stem}.weight"
    if name in params:
        return name
    return stem if kind == "diff" and stem in params else None


def _no_match(file: LoraFile, unmatched: list[str]) -> str:
    text = f"; it changes a text encoder ({len(file.text)} modules)" if file.text else ""
    named = f": {some(unmatched)}" if unmatched else ""
    count = len(unmatched)
    return f"{file.path} does not fit: none of its {count} modules is in the network{named}{text}"


def _stem(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")
