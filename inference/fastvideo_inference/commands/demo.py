"""`fastvideo demo`: serve the demo page of a checkout; an installed wheel has none."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typer import Option

import fastvideo
from fastvideo.errors import RefusedError, one_line

SOURCE = "git clone of the repository, then: pip install -e '.[demo]'"
BUDGETS_S = (2, 5, 10)
_DRAIN_S, _END_S = 3.0, 15.0


def demo(
    port: Annotated[int, Option(help="Port to listen on.", min=1, max=65535)] = 7860,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    server: Annotated[str, Option(help="URL of a server. [one is started]")] = "",
    model: Annotated[
        list[str] | None, Option("--model", "-m", help="Name or folder; repeatable. [all bundled]")
    ] = None,
    lora: Annotated[list[str] | None, Option(help="NAME=PATH; repeatable.")] = None,
    profile: Annotated[
        list[Path] | None, Option(help="File of `profile`: its model gets budgets; repeatable.")
    ] = None,
    open_: Annotated[bool, Option("--open", help="Open it in a browser.")] = False,
    share: Annotated[bool, Option("--share", help="A public link through gradio.live.")] = False,
) -> int:
    """Serve the demo page (needs a checkout and the extra `demo`)."""
    page = find_page()
    missing = [name for name in ("gradio", "fastapi", "uvicorn") if not find_spec(name)]
    if missing:
        text = f"the demo page needs {', '.join(missing)}"
        raise RefusedError(f"{text}; in the checkout: pip install -e '.[demo]'")
    if server and (model or lora or profile):
        raise RefusedError("--model, --lora, --profile: for a server that is started, not --server")
    named = [one.partition("=") for one in lora or ()]
    if wrong := [name for name, _, path in named if not name or not path]:
        raise RefusedError(f"--lora {wrong[0]!r} must be NAME=PATH")
    sys.path.insert(0, str(page.parent))
    how = {"host": host, "port": port, "opens": open_, "shares": share}
    try:
        if server:
            runpy.run_path(str(page))["serve"](server, **how)
        else:
            loras = {name: path for name, _, path in named}
            with own_server(model or (), loras, profile or ()) as process:
                serve = runpy.run_path(str(page))["serve"]  # takes seconds, in which both start
                serve(_url(process), **how)
    except (RuntimeError, OSError) as error:  # its server does not start, or the port is taken
        raise RefusedError(one_line(error)) from None
    finally:
        sys.path.remove(str(page.parent))
    return 0


def find_page() -> Path:
    """Return demos/app.py of the checkout that this package runs from, or of the current folder."""
    roots = [Path(fastvideo.__file__).parents[1], Path.cwd()]
    pages = [root / "demos" / "app.py" for root in roots]
    found = next((page for page in pages if page.is_file()), None)
    if found is None:
        tried = ", ".join(str(page) for page in pages)
        raise RefusedError(
            f"the demo page is not in the wheel (looked at {tried}); get it by {SOURCE}"
        )
    return found


@contextmanager
def own_server(
    models: Sequence[str], loras: Mapping[str, str], profiles: Sequence[Path] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Start `fastvideo serve` on a free port; its first line is its URL.

    It serves models (none: all bundled ones) and LoRAs by name, and keeps budgets for models with a
    profile. The process and all of its files are gone at the end of the block.
    """
    with tempfile.TemporaryDirectory(prefix="fastvideo-demo-") as folder:
        config = Path(folder, "serve.toml")
        text = _config(models, loras, profiles, Path(folder, "clips"))
        config.write_text(text, encoding="utf-8")
        words = ["-m", "fastvideo", "serve", "--config", str(config), "--port", "0"]
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the page, which ends it
        )
        try:
            yield process
        finally:
            _end(process)


def _url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None, "own_server has a pipe"
    url = process.stdout.readline().strip()
    if not url:
        raise RuntimeError(f"the page's server ended with code {process.wait()}")
    return url


def _config(
    models: Sequence[str], loras: Mapping[str, str], profiles: Sequence[Path], folder: Path
) -> str:
    """Write a server's config: a class for each budget, the models' own small decoders."""
    files = json.dumps([str(path.resolve()) for path in profiles])
    tables = [f"folder = {json.dumps(str(folder))}\nprofile = {files}"]
    tables.append('[[class]]\nname = "any time"')
    for seconds in BUDGETS_S if profiles else ():
        promise = f"deadline_s = {seconds}\nallow_smaller = true"
        tables.append(f'[[class]]\nname = "{seconds} s"\n{promise}')
    tables += [f"[[worker]]\nmodel = {json.dumps(_absolute(name))}" for name in models or [""]]
    named = [f"{json.dumps(name)} = {json.dumps(_absolute(path))}" for name, path in loras.items()]
    return "\n\n".join([*tables, '[decoder]\ntiny = "tiny"', "\n".join(["[lora]", *named])])


def _absolute(name: str) -> str:
    """Return a path that is right from any folder; a name that is no path as it is."""
    return str(Path(name).expanduser().resolve()) if name and Path(name).exists() else name


def _end(process: subprocess.Popen[str]) -> None:
    """End a server: the first signal drains, the second ends what runs."""
    for patience_s in (_DRAIN_S, _END_S):
        process.terminate()
        try:
            process.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    process.wait()
