"""`fastvideo demo`: open the demo page of a checkout; an installed wheel has none."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typer import Option

import fastvideo
from fastvideo import hub
from fastvideo.errors import RefusedError

SOURCE = "git clone of the repository, then: pip install -e '.[demo]'"


def demo(
    port: Annotated[int, Option(help="Port to listen on.", min=1, max=65535)] = 7860,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    model: Annotated[str, Option("--model", "-m", help="Name or folder.")] = hub.DEFAULT_MODEL,
) -> int:
    """Open the demo page in a browser (needs a checkout and the extra `demo`)."""
    page = find_page()
    if find_spec("gradio") is None:
        raise RefusedError("the demo page needs gradio; in the checkout: pip install -e '.[demo]'")
    arguments = ["--port", str(port), "--host", host, "--model", model]
    before, sys.argv = sys.argv, [str(page), *arguments]
    try:
        runpy.run_path(str(page), run_name="__main__")
    finally:
        sys.argv = before
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
