"""Train, distil and serve few-step Wan-style video models; public names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvideo_inference.pipeline import VideoPipeline
    from fastvideo_inference.remote import Job
    from fastvideo_inference.video import Video

    from fastvideo.hub import bundled as bundled_models
    from fastvideo.hub import open_spec
    from fastvideo.sampling import GenerateRequest
    from fastvideo.stages import Chunk, Done, Progress
    from fastvideo.worlds.shapes import kept as shapes_kept

__version__ = "0.1.0"

__all__ = [
    "Chunk",
    "Done",
    "GenerateRequest",
    "Job",
    "Progress",
    "Video",
    "VideoPipeline",
    "__version__",
    "bundled_models",
    "open_spec",
    "shapes_kept",
]

# public name: where it is
_PUBLIC = {
    "Chunk": "fastvideo.stages:Chunk",
    "Done": "fastvideo.stages:Done",
    "GenerateRequest": "fastvideo.sampling:GenerateRequest",
    "Job": "fastvideo_inference.remote:Job",
    "Progress": "fastvideo.stages:Progress",
    "Video": "fastvideo_inference.video:Video",
    "VideoPipeline": "fastvideo_inference.pipeline:VideoPipeline",
    "bundled_models": "fastvideo.hub:bundled",
    "open_spec": "fastvideo.hub:open_spec",
    "shapes_kept": "fastvideo.worlds.shapes:kept",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastvideo' has no attribute {name!r}")
    module, _, target = _PUBLIC[name].partition(":")
    return getattr(import_module(module), target)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
