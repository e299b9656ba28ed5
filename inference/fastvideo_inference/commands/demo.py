"""`fastvideo demo`: open the demo page of a checkout; an installed wheel has none."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typer import Option

import fastvideo
from fastvideo.errors import RefusedError, one_line

SOURCE = "git clone of the repository, then: pip install -e '.[demo]'"


def demo(
    port: Annotated[int, Option(help="Port to listen on.", min=1, max=65535)] = 7860,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    server: Annotated[str, Option(help="URL of a server. [one is started]")] = "",
    model: Annotated[
        list[str] | None, Option("--model", "-m", help="Name or folder; repeatable. [all bundled]")
    ] = None,
    lora: Annotated[list[str] | None, Option(help="NAME=PATH, offered by its name.")] = None,
    open_: Annotated[bool, Option("--open", help="Open it in a browser.")] = False,
    share: Annotated[bool, Option("--share", help="A public link through gradio.live.")] = False,
) -> int:
    """Serve the demo page (needs a checkout and the extra `demo`)."""
    page = find_page()
    missing = [name for name in ("gradio", "fastapi", "uvicorn") if not find_spec(name)]
    if missing:
        text = f"the demo page needs {', '.join(missing)}; in the checkout: pip install -e '.[demo]'"
        raise RefusedError(text)
    words = ["--port", str(port), "--host", host]
    words += ["--server", server] if server else []
    words += [word for name in model or () for word in ("--model", name)]
    words += [word for one in lora or () for word in ("--lora", one)]
    words += ["--open"] * open_ + ["--share"] * share
    before, path = sys.argv, sys.path[:]
    sys.argv, sys.path[:0] = [str(page), *words], [str(page.parent)]
    try:
        runpy.run_path(str(page), run_name="__main__")
    except RuntimeError as error:  # its server did not start
        raise RefusedError(one_line(error)) from None
    finally:
        sys.argv, sys.path[:] = before, path
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
