"""Prompts to token ids, with the cleaning that Wan's text encoder was trained with.

A tokenizer is a `tokenizer.json` of the `tokenizers` library; `tokenizer_config.json` beside it
lets transformers read the same folder.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from fastvideo import files
from fastvideo.log import logger

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_PAD, _EOS, _UNKNOWN = "<pad>", "</s>", "<unk>"
_WORD_START = "▁"
_RESERVED_TOKENS = 3 + 256 + 1  # pad, end, unknown; the bytes; the start of a word


def clean(prompt: str) -> str:
    """Repair mis-decoded text, undo HTML entities (twice), collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """A fixed vocabulary that turns prompts into padded ids and their masks."""

    def __init__(self, text: str, *, pad: str = _PAD, source: str | Path = _FILE) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{source} is not a tokenizer: {error}") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._text = text
        pad_id = self._backend.token_to_id(pad)
        if pad_id is None:
            raise ValueError(f"{source} has no padding token {pad!r}")
        self._pad, self._pad_id = pad, int(pad_id)
        self._num_added = int(self._backend.num_special_tokens_to_add(False))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a folder; raise `ValueError` if it holds no `tokenizer.json`."""
        path = Path(folder) / _FILE
        if not path.is_file():
            only_pieces = any((Path(folder) / n).is_file() for n in ("spiece.model", "vocab.json"))
            hint = "; convert it once with transformers' save_pretrained" if only_pieces else ""
            raise ValueError(f"{folder} has no {_FILE}{hint}")
        if what := files.stand_in(path):
            raise ValueError(f"{path} is {what}")
        text = path.read_bytes().decode(errors="replace")  # refused below, with its path
        return cls(text, pad=_pad_token(Path(folder) / _CONFIG), source=path)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return int(self._backend.get_vocab_size())

    def __call__(
        self, prompts: Sequence[str], max_length: int, *, pad_to: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Clean and tokenise prompts to ids (B, L) and masks (B, L), 1 for tokens, both int64.

        A longer prompt is cut, with a warning, to `max_length` ids of which the last still ends the
        text. L is the longest prompt's, or `pad_to`.
        """
        encodings = self._backend.encode_batch([clean(prompt) for prompt in prompts])
        for text in self.cuts(prompts, max_length):
            logger.warning("%s", text)
        rows = [self._cut(encoding.ids, max_length) for encoding in encodings]
        length = max(len(row) for row in rows) if pad_to is None else pad_to
        ids_BL = torch.full((len(rows), length), self._pad_id)
        mask_BL = torch.zeros_like(ids_BL)
        for i, row in enumerate(rows):
            ids_BL[i, : len(row)] = torch.tensor(row)
            mask_BL[i, : len(row)] = 1
        return ids_BL, mask_BL

    def cuts(self, prompts: Sequence[str], max_length: int, *, what: str = "prompt") -> list[str]:
        """Return a line for each prompt that is cut to `max_length` ids."""
        sizes = [len(e.ids) for e in self._backend.encode_batch([clean(p) for p in prompts])]
        return [
            f"{what} of {size} tokens is cut to {max_length}: {prompt[:60]!r}..."
            for prompt, size in zip(prompts, sizes, strict=True)
            if size > max_length
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids back into text, without padding and end marks."""
        return str(self._backend.decode(list(ids)))

    def save(self, folder: str | Path) -> Path:
        """Write the tokenizer so that `load` and transformers read it."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        files.write_text(path / _FILE, self._text, overwrite=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": self._pad,
            "eos_token": _EOS,
            "unk_token": _UNKNOWN,
            "model_max_length": 512,
            "clean_up_tokenization_spaces": False,
        }
        files.write_text(path / _CONFIG, json.dumps(config, indent=2) + "\n", overwrite=True)
        return path

    def _cut(self, ids: list[int], max_length: int) -> list[int]:
        if len(ids) <= max_length:
            return ids
        return ids[: max_length - self._num_added] + ids[len(ids) - self._num_added :]


def build_word_tokenizer(words: Iterable[str], folder: str | Path) -> Tokenizer:
    """Make a tokenizer of whole words (and marks), save it, return it; ids follow the sorted words.

    Text is lower-cased, punctuation stands alone, an unknown word becomes the bytes of its letters.
    """
    special = [_PAD, _EOS, _UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256)), _WORD_START]
    assert len(special) == _RESERVED_TOKENS, "reserved ids moved"
    known = sorted({_WORD_START + word.lower() for word in words})
    vocabulary = {token: i for i, token in enumerate([*special, *known])}
    backend = tokenizers.Tokenizer(
        models.BPE(  # without merges: a word is known as a whole or spelled in bytes
            vocab=vocabulary,
            merges=[],
            unk_token=_UNKNOWN,
            byte_fallback=True,
            ignore_merges=True,
        )
    )
    backend.normalizer = normalizers.Lowercase()
    start = pre_tokenizers.Metaspace(replacement=_WORD_START, prepend_scheme="always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), start])
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {_EOS}", pair=f"$A {_EOS} $B {_EOS}", special_tokens=[(_EOS, 1)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=_WORD_START), decoders.Fuse()]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special[:3]]
    )
    tokenizer = Tokenizer(backend.to_str(pretty=False))
    tokenizer.save(folder)
    return tokenizer


def _pad_token(config: Path) -> str:
    if not config.is_file():
        return _PAD
    try:
        token = json.loads(files.read_text(config)).get("pad_token", _PAD)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not a tokenizer's config: {error}") from None
    return str(token["content"] if isinstance(token, dict) else token)
