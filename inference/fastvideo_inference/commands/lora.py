"""`fastvideo lora`: put LoRAs into the weights of a model folder for good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastvideo import files, hub
from fastvideo.config import parse
from fastvideo.errors import OK, refusing
from fastvideo.resolve import find_lora
from fastvideo.sampling import LoraUse, read_lora

lora = typer.Typer(
    help="Merge LoRAs into a model folder.",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
)


@lora.callback()
def _lora() -> None:
    """Merge LoRAs into a model folder."""


@lora.command()
def merge(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id.")],
    loras: Annotated[
        list[str], typer.Argument(help="PATH[:STRENGTH] of a LoRA, or its name on the hub.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
) -> int:
    """Write a copy of a model folder whose denoiser has LoRAs in its weights."""
    with refusing():
        uses = [find_lora(parse(LoraUse, read_lora(text), source=text)) for text in loras]
        hub.open_spec(model)
        files.check_new(output)
    from fastvideo_inference import merging  # torch comes in here

    print(f"{merging.merge(model, uses, output)}: {len(uses)} LoRAs merged")
    return OK
