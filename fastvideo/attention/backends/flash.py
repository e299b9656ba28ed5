"""The flash-attn packages, the newest that is installed and runs on the GPU at hand."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvideo.attention.choice import Need
from fastvideo.attention.layout import Layout

_INSTALL = "not installed: pip install -e '.[flash]'"
_PACKAGES = {
    "flash-attn 4": "flash_attn.cute",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 2": "flash_attn",
}
_MIN_CAPABILITY = {"flash-attn 4": (9, 0), "flash-attn 3": (9, 0), "flash-attn 2": (8, 0)}


def unsupported(need: Need) -> str | None:
    """Dense patterns in half precision on an NVIDIA GPU that the installed package knows."""
    if not need.is_dense:
        return "serves dense patterns only"
    if need.device.type != "cuda":
        return f"needs an NVIDIA GPU, not {need.device.type}"
    if need.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(need.dtype).removeprefix('torch.')}"
    if need.head_dim > 256 or need.head_dim % 8:
        return f"needs heads of at most 256 channels in multiples of 8, not {need.head_dim}"
    capability = torch.cuda.get_device_capability(need.device)
    return None if _find(capability) else _why_none(capability)


def describe(need: Need) -> str:
    """Name the package that was found."""
    found = _find(torch.cuda.get_device_capability(need.device))
    return found[0] if found else _INSTALL


def attend(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, layout: Layout | None) -> Tensor:
    """Attend densely with the kernel that `unsupported` has found."""
    found = _find(torch.cuda.get_device_capability(q_BLHD.device))
    assert found is not None, "flash.attend was called although flash.unsupported gave a reason"
    out = found[1](q_BLHD, k_BSHD, v_BSHD)
    # Versions 3 and 4 may return the log-sum-exp beside the output.
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _find(capability: tuple[int, int]) -> tuple[str, Callable[..., Any]] | None:
    for name in _PACKAGES:
        kernel = _probe(name)
        if callable(kernel) and capability >= _MIN_CAPABILITY[name]:
            return name, kernel
    return None


def _why_none(capability: tuple[int, int]) -> str:
    broken = [f"{n}: {r}" for n in _PACKAGES if isinstance(r := _probe(n), str) and r != _INSTALL]
    found = [n for n in _PACKAGES if callable(_probe(n))]
    if found:
        return (
            f"{', '.join(found)} does not run on compute capability {capability[0]}.{capability[1]}"
        )
    return "; ".join(broken) or _INSTALL


@functools.cache
def _probe(name: str) -> Callable[..., Any] | str:
    """Return the package's attention function, or the reason why there is none."""
    try:
        module = importlib.import_module(_PACKAGES[name])
    except ModuleNotFoundError as error:
        top = _PACKAGES[name].partition(".")[0]
        missing = error.name or ""
        absent = missing == _PACKAGES[name] or missing == top
        return _INSTALL if absent else f"installed but needs {missing}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"installed but broken: {str(error).splitlines()[0]}"
    kernel: Callable[..., Any] | None = vars(module).get("flash_attn_func")
    return kernel or "installed but has no flash_attn_func"
