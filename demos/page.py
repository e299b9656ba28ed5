"""The page: its HTML, and what its buttons do on this side."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from run import ERRORS, MAX_CLIPS, Run, View, one_line

from fastvideo import VideoPipeline, bundled_models

HERE = Path(__file__).parent
SCRIPTS = ("view.js", "form.js", "gallery.js", "session.js")
MAX_KEPT = 24  # clips of a session
_WIRE = "watch('value', () => window.fastvideo?.(props.value))"


class Page:
    """The sessions of a page, one for each open tab: their runs and their clips' files."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.folder = Path(tempfile.mkdtemp(prefix="fastvideo-page-"))
        self.sessions: dict[str, Path] = {}
        self.runs: dict[str, tuple[str, Run]] = {}

    def offers(self) -> dict[str, Any]:
        """Return what the server offers, or why it does not answer."""
        try:
            found: dict[str, Any] = VideoPipeline.connect(self.url).offers()
        except ERRORS as error:
            return {"error": one_line(error)}
        own = {"bundled": bundled_models(), "max_clips": MAX_CLIPS, "max_kept": MAX_KEPT}
        return {**found, **own}

    def generate(self, form: Any, request: gr.Request) -> Iterator[View]:
        """Make the clips of a form, and yield what the page shows; a closed tab ends it."""
        session = str(request.session_hash)
        name = str(form.get("run", "")) if isinstance(form, dict) else ""
        if session not in self.sessions:  # its name is the browser's, and names no folder
            self.sessions[session] = Path(tempfile.mkdtemp(dir=self.folder))
        folder = self.sessions[session]
        run = Run(self.url, form, folder)
        self.runs[name] = session, run
        try:
            for view in run.views():
                yield {**view, "run": name}
            for path in sorted(folder.glob("*.mp4"), key=_age)[:-MAX_KEPT]:
                path.unlink(missing_ok=True)
        finally:
            self.runs.pop(name, None)

    def stop(self, name: Any) -> bool:
        """Stop a run by the name that its tab gave it; tell whether there is one."""
        _, run = self.runs.get(str(name), ("", None))
        if run:
            run.stop.set()
        return run is not None

    def leave(self, request: gr.Request) -> None:
        """End the runs of a closed tab and remove its files."""
        for session, run in list(self.runs.values()):
            if session == request.session_hash:
                run.stop.set()
        if folder := self.sessions.pop(str(request.session_hash), None):
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove the files of all sessions."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def build(self) -> gr.Blocks:
        """Build the page; `launch` is the caller's."""

        def offers(_: Any) -> dict[str, Any]:  # Gradio marks them, which methods refuse
            return self.offers()

        def stop(name: Any) -> bool:
            return self.stop(name)

        body, *scripts = [
            (HERE / name).read_text(encoding="utf-8") for name in ("page.html", *SCRIPTS)
        ]
        with gr.Blocks(title="fastvideo", analytics_enabled=False) as blocks:
            page = gr.HTML(
                html_template=body,
                js_on_load="\n".join(scripts),
                server_functions=[offers, stop],
                apply_default_css=False,
            )
            form = gr.JSON(visible=False)
            wire = gr.HTML({}, html_template="<i></i>", js_on_load=_WIRE)
            how = {"js": "() => [window.fastvideoForm]", "show_progress": "hidden"}
            page.submit(
                self.generate, form, wire, concurrency_limit=None, api_name="generate", **how
            )
            blocks.unload(self.leave)
        return blocks


def _age(path: Path) -> float:
    return path.stat().st_mtime
