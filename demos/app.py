"""The demo page: a prompt becomes a clip, alive from the first second.

python demos/app.py --port 7860 (or: fastvideo demo)
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from own_server import own_server

THEME_FILE = Path(__file__).parent / "page.css"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    parser.add_argument("--server", default="", help="URL of a server; without, one is started")
    parser.add_argument(
        "--model", "-m", action="append", default=[], help="name or folder; without, all bundled"
    )
    parser.add_argument("--lora", action="append", default=[], help="NAME=PATH, offered by its name")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--share", action="store_true", help="a public link, through gradio.live")
    args = parser.parse_args(words)
    if args.server and (args.model or args.lora):
        parser.error("--model and --lora are for a server that the page starts; not for --server")
    for word in args.lora:
        if not all(word.partition("=")):
            parser.error(f"--lora {word!r} must be NAME=PATH")
    return args


def main() -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    args = arguments()
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as held:
        loras = dict(word.split("=", 1) for word in args.lora)
        url = args.server or held.enter_context(own_server(args.model, loras))
        from page import Page  # late: its gradio takes seconds, in which the server starts

        page = Page(url)
        held.callback(page.close)
        blocks = page.build()
        held.callback(blocks.close, verbose=False)
        _, local, shared = blocks.launch(
            server_name=args.host,
            server_port=args.port,
            inbrowser=args.open,
            share=args.share,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            allowed_paths=[str(page.folder)],
            head=f"<style>{THEME_FILE.read_text(encoding='utf-8')}</style>",
        )
        print(f"the page is at {shared or local}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
