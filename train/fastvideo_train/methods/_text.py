"""What every text-to-video method shares: a tokenizer, its limits, and prompts as text states."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from fastvideo import registry
from fastvideo.config import Strict
from fastvideo.models.text import encode_prompts
from fastvideo.models.text.tokenizer import Tokenizer, build_word_tokenizer
from fastvideo.parallel.degrees import ParallelConfig
from fastvideo.spec import Scheduler
from fastvideo_train.origins import tokenizer_folder
from fastvideo_train.recipe import Recipe
from fastvideo_train.roles import Role


class TextConfig(Strict):
    """Text in and out of guidance.

    `max_text_tokens` must be what the exported spec says, as Wan attends to the zero rows after a
    prompt. `negative_prompt` is the one that guidance steers away from.
    """

    tokenizer: str = Field(
        min_length=1, description="a tokenizer's folder, a model, or world:<name>"
    )
    max_text_tokens: int = Field(ge=1)
    negative_prompt: str = ""


C = TypeVar("C", bound=TextConfig)


class Prompted(Generic[C]):
    """The part of a method that knows prompts."""

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    def sampler(self) -> Scheduler | None:
        """The only scheduler that the student may be sampled with; None leaves the choice."""
        return None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder or model, or one made of all words that a world says."""
        kind, _, name = self.config.tokenizer.partition(":")
        if kind != "world":
            return Tokenizer.load(tokenizer_folder(self.config.tokenizer))
        with tempfile.TemporaryDirectory() as folder:
            return build_word_tokenizer(registry.load("fastvideo.worlds", name, "words")(), folder)

    def check(self, recipe: Recipe, degrees: ParallelConfig) -> None:
        """Accept every recipe."""

    def initialise(self, roles: Mapping[str, Role]) -> None:
        """Keep the weights as their families drew them; refuse a tokenizer with too many words."""
        size = self.tokenizer.vocab_size
        legal = roles["text"].family.Config.parse(roles["text"].config).vocab_size
        if size > legal:
            raise ValueError(
                f"tokenizer {self.config.tokenizer} has {size} tokens and the text encoder's"
                f" vocab_size is {legal}; set roles.text.config.vocab_size to {size} or more"
            )

    def encode(self, prompts: Sequence[str], text: Role) -> Tensor:
        """Return text states (B, max_text_tokens, C), with gradients if the encoder learns."""
        with torch.set_grad_enabled(text.trainable and torch.is_grad_enabled()):
            return encode_prompts(
                text.net,
                self.tokenizer,
                prompts,
                max_tokens=self.config.max_text_tokens,
                device=str(next(text.net.parameters()).device),
            )
