"""The demo page: a prompt becomes a clip, alive from the first second (run by `fastvideo demo`)."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

from page import Page

STYLE = Path(__file__).parent / "page.css"


def serve(server: str, *, host: str, port: int, opens: bool, shares: bool) -> None:
    """Serve the page of a server's URL until Ctrl-C or SIGTERM."""
    with ExitStack() as held:
        page = Page(server)
        held.callback(page.close)
        blocks = page.build()
        held.callback(blocks.close, verbose=False)
        _, local, shared = blocks.launch(
            server_name=host,
            server_port=port,
            inbrowser=opens,
            share=shares,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            allowed_paths=[str(page.folder)],
            head=f"<style>{STYLE.read_text(encoding='utf-8')}</style>",
        )
        print(f"the page is at {shared or local}", flush=True)
        threading.Event().wait()
