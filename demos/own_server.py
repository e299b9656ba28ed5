"""A server of the page's own: `fastvideo serve` on a free port, with a folder that goes with it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

BUDGETS_S = (2, 5, 10)
_DRAIN_S, _END_S = 3.0, 15.0


@contextmanager
def own_server(models: Sequence[str], loras: Mapping[str, str]) -> Iterator[str]:
    """Start a server of models (none: all bundled ones) and LoRAs by name, and yield its URL.

    It and all of its files are gone at the end of the block. `RuntimeError` if it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="fastvideo-demo-") as folder:
        config = Path(folder, "serve.toml")
        config.write_text(_config(models, loras, Path(folder, "clips")), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-m", "fastvideo", "serve", "--config", str(config), "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the page, which ends it
        )
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError(f"the server ended with code {process.wait()}; see above")
            yield url
        finally:
            _end(process)


def _config(models: Sequence[str], loras: Mapping[str, str], folder: Path) -> str:
    """Write a server's config: a class for each budget, the models' own small decoders."""
    tables = [f"folder = {json.dumps(str(folder))}"]
    tables += [f"[[worker]]\nmodel = {json.dumps(_absolute(name))}" for name in models or [""]]
    tables += ['[[class]]\nname = "any time"']
    for seconds in BUDGETS_S:
        tables.append(
            f'[[class]]\nname = "{seconds} s"\ndeadline_s = {seconds}\nallow_smaller = true'
        )
    tables.append('[decoder]\ntiny = "tiny"')
    lines = [f"{json.dumps(name)} = {json.dumps(_absolute(path))}" for name, path in loras.items()]
    return "\n\n".join([*tables, "\n".join(["[lora]", *lines])]) + "\n"


def _absolute(name: str) -> str:
    """Return a path that is right from any folder; a name that is none as it is."""
    return str(Path(name).expanduser().resolve()) if name and Path(name).exists() else name


def _end(process: subprocess.Popen[str]) -> None:
    """End the server: the first signal drains, the second ends what runs."""
    for patience_s in (_DRAIN_S, _END_S):
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue
    process.kill()  # nothing, if it has ended
    process.wait()
