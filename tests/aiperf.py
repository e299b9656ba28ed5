"""AIPerf (NVIDIA's load generator, in an environment of its own) on a running server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

IS_THERE = shutil.which("aiperf") is not None
WHY = "needs aiperf on PATH (.ci/full clients)"


def measured(
    url: str, rows: Sequence[dict[str, Any]], words: Sequence[str], *, folder: Path
) -> Any:
    """Return AIPerf's figures of the requests in `rows` (a prompt as text, perhaps a timestamp)."""
    vocabulary = models.WordLevel({"<unk>": 0}, unk_token="<unk>")
    Tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        *("aiperf", "profile", "--model", "tiny", "--url", url, "--ui", "none"),
        *("--endpoint-type", "video_generation", "--tokenizer", ".", *words),
        *("--input-file", "prompts.jsonl", "--custom-dataset-type", "single_turn"),
    ]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = [*folder.rglob("profile_export_aiperf.json")]
    assert len(found) == 1, run.stdout[-2000:] + run.stderr[-2000:]
    return json.loads(found[0].read_text())
