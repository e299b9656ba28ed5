"""Configs that transformers, diffusers and PEFT write: which of their keys count here.

    unknown = foreign.check(values, foreign.UNIPC, source=path)

Their next releases will add keys, and most of those say nothing of the arithmetic. A key that does
is checked by its value; one that is not known here is returned, to be warned of and noted in the
recipe. In configs of DiTs and VAEs an unknown key can mean wrong frames and is refused there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fastvideo import files
from fastvideo.log import logger

# FastWan was trained at sigmas looked up in a table of 1000 rows, so they are not times / 1000.
FASTWAN_SIGMAS, FASTWAN_TIMESTEPS = (1.0, 0.756757, 0.521739), (1000.0, 757.0, 522.0)


@dataclass(frozen=True)
class Keys:
    """The keys of one kind of config, `read` and `idle` as words.

    `read` are used; `fixed` change the arithmetic, of which these values are implemented (a tuple
    holds several); `idle` do not change it. `missing` is what a library takes for a fixed key that
    the file omits, where that is not the first value.
    """

    read: str
    fixed: Mapping[str, Any]
    idle: str
    missing: Mapping[str, Any] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        """Tell whether a key is known; those with an underscore name classes and versions."""
        words = (*self.read.split(), *self.fixed, *self.idle.split())
        return key in words or key.startswith("_")

    def legal(self) -> dict[str, tuple[Any, ...]]:
        """Return the values that each fixed key may have."""
        return {key: v if isinstance(v, tuple) else (v,) for key, v in self.fixed.items()}

    def implemented(self) -> dict[str, Any]:
        """Return the value of each fixed key, as a config that is written has it."""
        return {key: legal[0] for key, legal in self.legal().items()}


UMT5 = Keys(
    read=(
        "vocab_size d_model d_kv d_ff num_layers num_heads relative_attention_num_buckets"
        " relative_attention_max_distance layer_norm_epsilon"
    ),
    fixed={"dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu", "is_gated_act": True},
    idle=(
        "architectures bos_token_id classifier_dropout decoder_start_token_id dropout_rate dtype"
        " eos_token_id initializer_factor is_decoder is_encoder_decoder model_type name_or_path"
        " num_decoder_layers output_past pad_token_id scalable_attention scale_decoder_outputs"
        " task_specific_params tie_word_embeddings tokenizer_class torch_dtype transformers_version"
        " use_cache"
    ),
)

TOKENIZER = Keys(
    read="pad_token",
    fixed={"padding_side": "right", "truncation_side": "right", "split_special_tokens": False},
    idle=(
        "added_tokens_decoder additional_special_tokens backend bos_token"
        " clean_up_tokenization_spaces eos_token extra_ids extra_special_tokens is_local legacy"
        " local_files_only max_length model_input_names model_max_length name_or_path"
        " processor_class sp_model_kwargs special_tokens_map_file tokenizer_class tokenizer_file"
        " unk_token use_fast"
    ),
)

_FLOW = {
    "shift_terminal": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
    "num_train_timesteps": 1000,
}
UNIPC = Keys(
    read="flow_shift",
    fixed={
        **_FLOW,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "thresholding": False,
        "disable_corrector": [],
        "final_sigmas_type": "zero",
        "solver_p": None,
    },
    # what diffusers takes for a key that the file omits
    missing={"prediction_type": "epsilon", "use_flow_sigmas": False},
    # without thresholding and betas, their numbers do not count
    idle=(
        "beta_end beta_schedule beta_start dynamic_thresholding_ratio rescale_betas_zero_snr"
        " sample_max_value sigma_max sigma_min steps_offset time_shift_type timestep_spacing"
        " trained_betas"
    ),
)
EULER = Keys(
    read="shift",
    fixed={**_FLOW, "invert_sigmas": False, "stochastic_sampling": False},
    # of dynamic shifting, which is off
    idle="base_image_seq_len base_shift max_image_seq_len max_shift time_shift_type",
)

PEFT = Keys(
    read="alpha_pattern lora_alpha r rank_pattern use_rslora",
    fixed={
        "peft_type": "LORA",
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "fan_in_fan_out": False,
        # the others move a part of the base weights into the maps
        "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
        "kasa_config": None,
        "layer_replication": None,
        "monteclora_config": None,
        "use_bdlora": (None, False),
        "use_dora": False,
        "use_qalora": False,
        "velora_config": None,
    },
    idle=(
        "auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config"
        " exclude_modules inference_mode layers_pattern layers_to_transform loftq_config lora_bias"
        " lora_dropout lora_ga_config megatron_config megatron_core modules_to_save peft_version"
        " qalora_group_size revision runtime_config target_modules target_parameters task_type"
        " trainable_token_indices"
    ),
)


def weight_map(index: Path) -> dict[str, str]:
    """Read which file beside an index holds each tensor; `ValueError` for one that leads away."""
    try:
        values = json.loads(files.read_text(index))
        places = values["weight_map"]
        if not isinstance(places, dict) or not places:
            raise ValueError(f"weight_map must be an object that names files, not {places!r:.40}")
        for name, file in places.items():
            path = PurePosixPath(file) if isinstance(file, str) and file else None
            if path is None or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{name} is in {file!r}, which is no file of its folder")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{index} is not a shard index: {error}") from None
    return places


def check(values: Mapping[str, Any], known: Keys, *, source: object) -> tuple[str, ...]:
    """Return "key = value" for each key that is not known and is not switched off.

    Raises a one-line `ValueError` for a value that changes the arithmetic into another.
    """
    for key, legal in known.legal().items():
        value = values.get(key, known.missing.get(key, legal[0]))
        if not any(_equal(value, one) for one in legal):
            rule = " or ".join(map(repr, legal))
            raise ValueError(f"{key} {value!r} in {source} must be {rule}")
    unknown = []
    for key, value in values.items():
        if key in known:
            continue
        if value is None or value is False or value in ({}, []):
            logger.info("%s in %s is not known here, and is off", key, source)
        else:
            unknown.append(f"{key} = {value!r}")
    return tuple(unknown)


def warn(unknown: tuple[str, ...], *, source: object) -> None:
    """Log one warning for the keys that `check` returned, if there are any."""
    if unknown:
        logger.warning(
            "%s has keys that are not known here and are not used: %s", source, ", ".join(unknown)
        )


def _equal(value: Any, legal: Any) -> bool:
    """Compare as JSON does, where true is not 1."""
    return isinstance(value, bool) == isinstance(legal, bool) and bool(value == legal)
