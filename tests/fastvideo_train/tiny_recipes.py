"""Recipes of seconds for tests: the real networks at their smallest."""

from __future__ import annotations

from pathlib import Path

from fastvideo_train import recipe as recipes
from fastvideo_train.loop import Job, train
from fastvideo_train.recipe import Recipe

from fastvideo.config import assignments, merge, parse

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "train" / "nano"
FILES = {
    "vae": "vae.toml",
    "flow_matching": "dit-image.toml",
    "classify": "classifier.toml",
    "decoder": "decoder.toml",
    "perflow": "dit-perflow.toml",
    "dmd": "dit-dmd.toml",
    "consistency": "dit-consistency.toml",
}


def tiny(method: str, *sets: str) -> Recipe:
    """The smoke form of a bundled recipe, dense: six steps, constant rate, every number logged."""
    file = FILES[method]
    base = recipes.dump(recipes.load(CONFIGS / file, smoke=True))
    for role in base["roles"].values():
        del role["attention"]
        role["config"].pop("gate_compress", None)
    quick = ["run.steps=6", "run.save_every_s=1e9", "run.threads=0", "optim.warmup=2"]
    tree = merge(base, assignments([*quick, *sets]))
    return parse(Recipe, tree, source="test")


def finish(recipe: Recipe, folder: Path, *, until: int | None = None) -> Job:
    """Train to the end, or until `until` steps are finished; both end with a checkpoint."""
    job = Job.open(recipe, folder)
    for _ in train(job, stop=lambda: until is not None and job.step >= until):
        pass
    return job
