"""`fastvideo export RUN`: the averaged weights of a run, as a folder that goes into --model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastvideo.config import assignments
from fastvideo.errors import OK, refusing


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run, such as runs/nano-vae.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of [export]: vae=runs/vae/export. Repeatable."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an old folder.")] = False,
    merge_lora: Annotated[
        bool,
        typer.Option("--merge-lora", help="A model folder with the run's LoRA in its weights."),
    ] = False,
) -> int:
    """Export a run: a whole model, the vae/ of a run that trains a VAE, or another lone network.

    A run that learned a LoRA gives one file, OUTPUT.safetensors.
    """
    with refusing():
        changes = assignments(sets or ())
        if not run.is_dir():
            raise ValueError(f"run {run} is not a folder")
        if output.exists() and not overwrite:
            raise ValueError(f"{output} exists; choose another folder or say --overwrite")
    from fastvideo_train.export import export as export_run  # torch comes in here

    done = export_run(run, output, changes=changes, overwrite=overwrite, merge_lora=merge_lora)
    print(
        f"{done.folder}: read back; one forward differs by {done.error:.1e} from the live networks,"
        f" by {done.rounding:.1e} from their unrounded weights"
    )
    return OK
