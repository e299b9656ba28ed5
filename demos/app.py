"""The demo page: a prompt becomes a clip, with its progress and its recipe in view.

python demos/app.py --port 7860 (or: fastvideo demo)
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import gradio as gr

from fastvideo import Done, GenerateRequest, Progress, VideoPipeline, bundled_models, open_spec

EXAMPLES = [
    "a big red ball moving left at night",
    "a small yellow star bouncing over the sea",
    "a green square moving up in a meadow",
]
MAX_QUEUE = 16
KEEP_S = 3600
CLIP_HEIGHT_PX = 480
LOOK = "accent-color: var(--color-accent)"


class Page:
    """What the page's buttons do: one loaded model at a time, one clip at a time."""

    def __init__(self, pipeline: VideoPipeline) -> None:
        self.pipeline = pipeline
        self.folder = tempfile.TemporaryDirectory(prefix="fastvideo-demo-")

    def use(self, model: str) -> VideoPipeline:
        """Return the pipeline of a model, loading it if another one is loaded."""
        if model != self.pipeline.model_id.name_or_path:
            self.pipeline = VideoPipeline.from_pretrained(model)
        return self.pipeline

    def generate(
        self, prompt: str, seed: float | None, steps: float, model: str
    ) -> Iterator[tuple[Any, Any, str]]:
        """Yield (clip, recipe, progress); the page cancels between two of them."""
        try:
            pipe = self.use(model)
            request = GenerateRequest(
                prompt=prompt,
                seed=None if seed is None else int(seed),
                num_inference_steps=int(steps),
            )
            last = None
            for last in pipe.events(request):
                if isinstance(last, Progress):
                    yield gr.skip(), gr.skip(), bar(last)
            assert isinstance(last, Done), "stages end in Done"
            video = pipe.video(last.state)
            path = video.save(Path(self.folder.name) / f"{uuid4().hex}.mp4")
        except (ValueError, OSError) as error:
            raise gr.Error(first_reason(error), print_exception=False) from error
        seconds = ", ".join(f"{k.replace('_', ' ')} {s:.1f} s" for k, s in video.timings.items())
        yield str(path), video.recipe, f"seed {video.recipe['request']['seed']}; {seconds}"
        path.unlink(missing_ok=True)  # the page has its own copy by now


def bar(progress: Progress) -> str:
    """Draw a stage's progress with the browser's own element."""
    name = progress.stage.replace("_", " ")
    place = f"value='{progress.index}' max='{progress.total}'"
    return f"{name} {progress.index}/{progress.total} <progress {place} style='{LOOK}'></progress>"


def steps_of(model: str) -> gr.Slider:
    """Return the slider of a model: at its default, and fixed where it has steps of its own."""
    try:
        spec, _ = open_spec(model)
    except (ValueError, OSError) as error:
        raise gr.Error(first_reason(error), print_exception=False) from error
    is_fixed = spec.scheduler.name == "few_step"
    return gr.Slider(
        1,
        100,
        value=spec.defaults.num_inference_steps,
        step=1,
        label="Steps",
        interactive=not is_fixed,
        info="those that this model was distilled for" if is_fixed else None,
    )


def first_reason(error: Exception) -> str:
    """Return one line of an error; pydantic's begins with the rule that was broken."""
    details = getattr(error, "errors", None)
    return details()[0]["msg"].removeprefix("Value error, ") if details else str(error)


def build(pipeline: VideoPipeline) -> gr.Blocks:
    """Build the page; `launch` and its theme are the caller's."""
    page = Page(pipeline)
    loaded = pipeline.model_id.name_or_path
    with gr.Blocks(title="fastvideo", delete_cache=(KEEP_S, KEEP_S)) as blocks:
        gr.Markdown("# fastvideo\nA prompt becomes a clip.")
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0], lines=2)
                gr.Examples(EXAMPLES, prompt)
                models = sorted({*bundled_models(), loaded})
                model = gr.Dropdown(models, value=loaded, label="Model")
                steps = steps_of(loaded)
                seed = gr.Number(-1, precision=0, label="Seed", info="-1 draws one")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column():
                clip = gr.Video(label="Clip", autoplay=True, loop=True, height=CLIP_HEIGHT_PX)
                status = gr.HTML(label="Progress")
                with gr.Accordion("Recipe", open=False):
                    recipe = gr.JSON(show_label=False)
        run = gr.on(
            [start.click, prompt.submit],
            page.generate,
            [prompt, seed, steps, model],
            [clip, recipe, status],
            concurrency_limit=1,
            api_name="generate",
        )
        model.change(steps_of, model, steps, api_visibility="private")
        stop.click(lambda: "stopped", None, status, cancels=[run], api_visibility="private")
    return blocks.queue(max_size=MAX_QUEUE)


def main() -> None:
    """Load the model named on the command line and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--model", default=argparse.SUPPRESS, help="bundled name or folder")
    args = parser.parse_args()
    chosen = {"name_or_path": args.model} if "model" in args else {}
    blocks = build(VideoPipeline.from_pretrained(**chosen))
    blocks.launch(
        server_name=args.host, server_port=args.port, show_error=True, theme=gr.themes.Soft()
    )


if __name__ == "__main__":
    main()
