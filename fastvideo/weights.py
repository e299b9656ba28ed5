"""Weight files, strictly: mapped reading, loading all or nothing, atomic writing."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastvideo import files, foreign

STEMS = ("diffusion_pytorch_model", "vsa_gated_model", "model")
_PICKLED = (".pt", ".pth", ".bin")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_NAMED = 8
_MAX_HEADER_BYTES = 100_000_000

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; `end` counts bytes from the start of all data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    end: int = 0


def read_header(path: str | Path) -> dict[str, TensorInfo]:
    """Read the names, types and shapes of a safetensors file; its data need not be there."""
    header, _ = _parse_header(Path(path))
    infos = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (_, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path} is corrupt: its entry for tensor {name} is {entry}") from None
        if kind not in _DTYPES:
            raise ValueError(f"{path}: tensor {name} has type {kind}, which is not readable")
        infos[name] = TensorInfo(_DTYPES[kind], shape, end)
    return infos


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the text entries of a safetensors header."""
    header, _ = _parse_header(Path(path))
    return dict(header.get("__metadata__", {}))


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of one file or of one (sharded) folder, read when asked for.

    A folder is searched for `{stem}.safetensors.index.json`, then `{stem}.safetensors`. Tensors
    of a safetensors file are views of the mapped file: copy one before changing it.
    Raises `ValueError` naming the file if a shard is missing, truncated or corrupt.
    """

    def __init__(self, path: str | Path, *, stem: str | None = None) -> None:
        self.path = Path(path)
        try:
            str(path).encode()
        except UnicodeEncodeError:  # safetensors would call the file corrupt
            raise ValueError(f"{path} has a name that is not UTF-8: rename it") from None
        self._readers: dict[Path, Any] = {}
        self._pickled: dict[str, Tensor] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        if self.path.suffix in _PICKLED:
            self._pickled = _read_pickle(self.path)
            self._infos = {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in self._pickled.items()}
            return
        for file, names in _shards(self.path, (stem,) if stem else STEMS):
            self._add(file, names)

    def names(self) -> list[str]:
        """List the tensors."""
        return list(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor without reading it."""
        return self._infos[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of one tensor without reading it."""
        return self._infos[name].dtype

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, mapped from its file."""
        if name in self._pickled:
            return self._pickled[name]
        file = self._files[name]
        if file not in self._readers:
            try:
                self._readers[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is corrupt: {error}") from None
        tensor: Tensor = self._readers[file].get_tensor(name)
        return tensor

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._infos:
            raise KeyError(name)
        return self.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def _add(self, file: Path, names: Iterable[str] | None) -> None:
        infos = read_header(file)
        _, start = _parse_header(file)
        needed = start + max((info.end for info in infos.values()), default=0)
        actual = file.stat().st_size
        if actual != needed:
            word = "truncated" if actual < needed else "corrupt"
            raise ValueError(f"{file} is {word}: {actual:,} bytes, its header needs {needed:,}")
        wanted = list(infos) if names is None else list(names)
        absent = [name for name in wanted if name not in infos]
        if absent:
            raise ValueError(f"{file} lacks {_some(absent)}, which the folder's index places in it")
        for name in wanted:
            self._infos[name] = infos[name]
            self._files[name] = file


def build(factory: Callable[[], M]) -> M:
    """Build a module on the meta device: no memory, no values; `load_into` makes it real."""
    with torch.device("meta"), _Undrawn():
        return factory()


class _Undrawn(TorchFunctionMode):
    """Leaves new weights undrawn: on meta there are none, and torch imports its compiler (1.2 s) to
    draw them there.
    """

    def __init__(self) -> None:
        super().__init__()
        named = vars(nn.init).items()
        draws = [draw for name, draw in named if name.endswith("_") and callable(draw)]
        self.draws = frozenset([Tensor.normal_, Tensor.uniform_, *draws])

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the tensor as it is instead of filling it with random numbers."""
        kwargs = kwargs or {}
        if func in self.draws:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def fitting(
    module: nn.Module,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    source: str | Path,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Return the tensor of every parameter and persistent buffer of a module, in its order.

    Arguments and errors are those of `load_into`. Shapes alone are looked at: what is mapped from
    a file is not read.
    """
    given = _untie(dict(tensors), aliases or {})
    slots = module.state_dict()
    _check(slots, given, source)
    return {name: given[name] for name in slots}


def load_into(
    module: nn.Module,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep_float32: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Give every parameter and persistent buffer of a module its tensor, or change nothing.

    dtype: type that floating tensors are cast to (None: as stored); tensors whose name contains
        one of `keep_float32` become float32 whatever dtype says.
    device: where they go; on "meta" a module has their types alone, and nothing is read.
    aliases: second names of tied tensors, {alias: name}: allowed, used where `name` is absent.

    Raises `ValueError` naming every missing, unexpected and mis-shaped tensor (eight of each kind,
    and how many more).
    """
    given = fitting(module, tensors, source=source, aliases=aliases)
    real: dict[str, Tensor] = {}
    for name in list(given):
        one = {name: given.pop(name)}  # one at a time: the mapped pages can go again
        real |= cast(one, dtype=dtype, device=device, keep_float32=keep_float32)
    module.load_state_dict(real, strict=True, assign=True)
    is_outline = torch.device(device).type == "meta"
    left = [n for n, t in _all_tensors(module) if t.is_meta and not is_outline]
    assert not left, f"{type(module).__name__} keeps {_some(left)} on meta after loading"


def cast(
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    keep_float32: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Copy tensors; floating ones become `dtype`, or float32 where the name has a kept part."""
    copies = {}
    for name, tensor in tensors.items():
        kept = any(part in name for part in keep_float32)
        target = torch.float32 if kept else dtype
        if target is None or not tensor.is_floating_point():
            target = tensor.dtype
        copies[name] = tensor.detach().to(device=device, dtype=target, copy=True)
    return copies


def save(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a safetensors file atomically (a reader sees the old file or the whole new one).

    The same content gives the same bytes. Raises `ValueError` with the system's reason if the file
    cannot be written.
    """
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        whole = value.untyped_storage().nbytes() == value.nbytes
        if not whole or value.data_ptr() in seen:  # the format has no shared or partial storage
            value = value.clone()
        seen.add(value.data_ptr())
        plain[name] = value
    try:
        with files.atomic(Path(path), overwrite=True) as new:
            save_file(plain, new, metadata={"format": "pt", **(metadata or {})})
            _sort_metadata(new)
            new.chmod(0o644)  # the library leaves files that only their owner can read
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {path}: {error}") from None
    return Path(path)


def _sort_metadata(path: Path) -> None:
    """Put the text entries of a header in order; the library writes them in a random one."""
    header, start = _parse_header(path)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    if len(raw) <= start - 8:
        with path.open("rb+") as file:
            file.seek(8)
            file.write(raw.ljust(start - 8))


def _parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header and the offset at which data starts."""
    try:
        if what := files.stand_in(path):
            raise ValueError(f"it is {what}")
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ValueError("shorter than a header")
            (length,) = struct.unpack("<Q", prefix)
            if length > _MAX_HEADER_BYTES:
                raise ValueError("the length of its header is absurd")
            raw = file.read(length)
        if len(raw) < length:
            raise ValueError("the header is cut off")
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    return header, 8 + length


def _shards(path: Path, stems: tuple[str, ...]) -> list[tuple[Path, list[str] | None]]:
    """Return (file, names it must hold); names are None for a single file."""
    if path.is_file() or path.suffix == ".safetensors":
        return [(path, None)]
    for stem in stems:
        index = path / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _indexed(index)
        if (path / f"{stem}.safetensors").is_file():
            return [(path / f"{stem}.safetensors", None)]
    wanted = " or ".join(f"{stem}.safetensors" for stem in stems)
    more = files.downloads(path)
    raise ValueError(f"{path} holds no weights; looked for {wanted}, whole or with an index{more}")


def _indexed(index: Path) -> list[tuple[Path, list[str] | None]]:
    places = foreign.weight_map(index)
    shards: dict[str, list[str]] = {}
    for name, file in places.items():
        shards.setdefault(file, []).append(name)
    absent = [file for file in shards if not (index.parent / file).is_file()]
    if absent:
        more = files.downloads(index.parent)
        raise ValueError(f"{index.parent} lacks {_some(absent)}, named by {index.name}{more}")
    return [(index.parent / file, names) for file, names in sorted(shards.items())]


def _read_pickle(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if what := files.stand_in(path):
        raise ValueError(f"{path} is {what}")
    try:
        mapped = zipfile.is_zipfile(path)  # torch's older form cannot be mapped
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises five unrelated types for a broken file
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is not a readable torch checkpoint: {reason}") from None
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise ValueError(f"{path} is not a flat dictionary of tensors")
    return values


def _untie(given: dict[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    for alias, name in aliases.items():
        if alias in given:
            tied = given.pop(alias)
            given.setdefault(name, tied)
    return given


def _check(slots: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str | Path) -> None:
    missing = [name for name in slots if name not in given]
    unexpected = [name for name in given if name not in slots]
    misshaped = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(slot.shape)}"
        for name, slot in slots.items()
        if name in given and given[name].shape != slot.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    wrong = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if wrong:
        raise ValueError(f"{source} does not fit the network; {'; '.join(wrong)}")


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMED])
    rest = len(names) - _MAX_NAMED
    return f"{shown} and {rest} more" if rest > 0 else shown
