"""What a config offers by name: models, LoRAs and small decoders; torch-free."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from fastvideo import hub
from fastvideo.hub import OpenModel
from fastvideo.registry import did_you_mean
from fastvideo.sampling import LoraUse
from fastvideo_inference import recipe
from fastvideo_inference.engine.config import ServeConfig
from fastvideo_inference.goodput import profile as profiles
from fastvideo_inference.serve.errors import ApiError, public


class Catalogue:
    """Names that clients use, and what they stand for on this machine."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._open: dict[str, OpenModel] = {}

    @cached_property
    def models(self) -> dict[str, str]:
        """The id of each model, and its name for the hub; the default one first."""
        found: dict[str, str] = {}
        for worker in self._config.worker:
            bundled = sorted(hub.bundled(), key=lambda name: name != hub.DEFAULT_MODEL)
            for name in [worker.model] if worker.model else bundled:
                model_id = Path(name).name if Path(name).is_dir() else name
                if found.setdefault(model_id, name) != name:
                    text = f"worker.model: {name} and {found[model_id]} share the id {model_id!r}"
                    raise ValueError(text)
        return found

    def model(self, model_id: str) -> OpenModel:
        """Return a model's spec and folder; 404 for an unknown id, "" is the default."""
        name = self.models.get(model_id or next(iter(self.models)))
        if name is None:
            raise _unknown("model", model_id, self.models, status=404)
        if name not in self._open:
            self._open[name] = hub.open_model(name)
        return self._open[name]

    def id_of(self, name: str) -> str:
        """Return the id of a model by its name for the hub."""
        return next((key for key, value in self.models.items() if value == name), Path(name).name)

    def offers(self) -> dict[str, Any]:
        """Return the models with their defaults and limits, and the names that requests may use."""
        classes = [one.model_dump(exclude={"queue"}) for one in self._config.class_]
        return {
            "data": [self._offer(model_id) for model_id in self.models],
            "lora": list(self._config.lora),
            "slo_class": classes,
            "limits": self._config.limits.model_dump(),
        }

    @cached_property
    def _profiled(self) -> set[str]:
        return {profiles.read(path).model for path in self._config.profile}

    def _offer(self, model_id: str) -> dict[str, Any]:
        found = {"id": model_id, "object": "model", "created": 0, "owned_by": "fastvideo"}
        try:
            model = self.model(model_id)
        except (ValueError, OSError):  # one of the hub that is out of reach
            return found
        spec, fits = model.spec, []
        for name in self._config.decoder:
            with suppress(ValueError, OSError):
                self.decoder(name, model)
                fits.append(name)
        return {
            **found,
            "title": spec.provenance.title,
            "notes": spec.provenance.notes,
            "defaults": spec.defaults.model_dump(exclude={"max_text_tokens"}),
            "stride": {
                "num_frames": spec.compression.temporal,
                "height": spec.compression.spatial * spec.compression.patch[1],
                "width": spec.compression.spatial * spec.compression.patch[2],
            },
            "is_distilled": spec.scheduler.name == "few_step",
            "has_profile": model.name in self._profiled,  # else no class is promised
            "decoder": fits,
        }

    def public(self, text: str) -> str:
        """Return a message with the names that clients use in place of this machine's paths."""
        config = self._config
        known = {path: key for key, path in (*config.lora.items(), *config.decoder.items())}
        known |= {name: Path(name).name for name in self.models.values() if "/" in name}
        for path in sorted(known, key=len, reverse=True):
            text = text.replace(path, known[path])
        return public(text)

    def decoder(self, name: str, model: OpenModel) -> str:
        """Return the path of a small decoder; 400 for an unknown name, "" for the VAE's own."""
        if name in ("", "vae"):
            return ""
        if name not in self._config.decoder:
            raise _unknown("decoder", name, ("vae", *self._config.decoder))
        path = self._config.decoder[name]
        recipe.decoder_id(path, model.spec, model.folder)  # whether it fits
        return path

    def lora(self, use: LoraUse) -> LoraUse:
        """Return the use of a LoRA's file; 400 for an unknown name."""
        if use.path not in self._config.lora:
            raise _unknown("lora", use.path, self._config.lora)
        return use.model_copy(update={"path": self._config.lora[use.path]})


def _unknown(field: str, name: str, known: Collection[str], *, status: int = 400) -> ApiError:
    hint = did_you_mean(name, known)
    text = f"{field} {name!r} is unknown{hint} (known: {', '.join(known) or 'none'})"
    code = "model_not_found" if field == "model" else "invalid_value"
    return ApiError(status, text, code=code, param=field)
