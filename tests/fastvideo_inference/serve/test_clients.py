"""Clients that others wrote: the openai SDK, Prometheus' parser, schemathesis."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import aiperf
from tests.serving import BALL, Running, Start

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
def client(server: Running) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_sdk_creates_polls_downloads_lists_and_deletes(client: Any, tmp_path: Path):
    fields = {"num_frames": 5, "seed": 3, "negative_prompt": "a blue square"}
    video = client.videos.create_and_poll(
        prompt="a red ball", size="48x32", seconds="1", extra_body=fields
    )
    assert (video.status, video.progress, video.size) == ("completed", 100, "48x32")
    assert (video.num_frames, video.seed, video.seconds) == (5, 3, "0.625")
    file = tmp_path / "clip.mp4"
    client.videos.download_content(video.id).write_to_file(file)
    assert file.read_bytes()[4:8] == b"ftyp"
    image = client.videos.download_content(video.id, variant="thumbnail").read()
    assert image[8:12] == b"WEBP"
    assert video.id in [one.id for one in client.videos.list(limit=1)], "through all pages"
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_the_sdk_raises_its_own_errors(client: Any):
    for given, error in (
        ({"model": "sora-2"}, openai.NotFoundError),
        ({"size": "99999999x8"}, openai.BadRequestError),
        ({"input_reference": b"png"}, openai.BadRequestError),
    ):
        with pytest.raises(error) as caught:
            client.videos.create(prompt="a red ball", **given)
        assert caught.value.body["message"] in str(caught.value)


def test_prometheus_reads_the_metrics(start: Start):
    parser = pytest.importorskip("prometheus_client.parser")
    server = start()
    server.finished(BALL)
    server.refused("POST", "/v1/videos", {"prompt": ""})
    deleted = server.create({**BALL, "num_inference_steps": 100})
    server.ask("DELETE", f"/v1/videos/{deleted['id']}")
    text = server.ask("GET", "/metrics")[2].decode()
    samples = {
        (sample.name.removeprefix("fastvideo_"), *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["admitted_total",] == 2
    assert samples["completed_total",] == 1
    assert samples["cancelled_total",] == 1
    assert samples["rejected_total", "invalid_value"] == 1
    assert samples["queue_jobs", "default"] >= 0
    assert samples["running_jobs",] >= 0
    assert samples["queue_seconds_count",] >= 1
    assert samples["stage_seconds_count", "denoise"] >= 1
    assert samples["stage_seconds_sum", "denoise"] > 0
    assert samples["transfer_seconds_count",] >= 0
    assert samples["worker_deaths_total",] == samples["transfer_bytes_total",] == 0


def linked(server: Running) -> dict[str, Any]:
    """Return the server's schema, in which a created job leads to all that is asked by its id."""
    schema: dict[str, Any] = server.ask("GET", "/openapi.json")[2]
    of_ids = (path for path in schema["paths"] if "{video_id}" in path)
    ids = [one["operationId"] for path in of_ids for one in schema["paths"][path].values()]
    links = {
        name: {"operationId": name, "parameters": {"video_id": "$response.body#/id"}}
        for name in ids
    }
    assert len(links) == 4
    schema["paths"]["/v1/videos"]["post"]["responses"]["200"]["links"] = links
    return schema


@pytest.mark.parametrize(
    ("phases", "each"), [("fuzzing", 10), pytest.param("all", 500, marks=pytest.mark.full)]
)
def test_schemathesis_finds_no_request_that_is_answered_5xx(
    start: Start, phases: str, each: int, tmp_path: Path
):
    pytest.importorskip("schemathesis")
    server = start(**{"class": [{"name": "default", "queue": 4}]})
    phases = "coverage,fuzzing,stateful" if phases == "all" else phases
    (schema := tmp_path / "openapi.json").write_text(json.dumps(linked(server)))
    own = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
    words = [
        *("run", str(schema), "--url", server.url, "--checks", "not_a_server_error"),
        *("--mode", "all"),
        *("--phases", phases, "--max-examples", str(each), "--seed", "1"),
        *("--suppress-health-check", "all", "--generation-database", "none", "--no-color"),
    ]
    command = [sys.executable, "-c", own, *words]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=server.folder)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    found = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert found, run.stdout
    assert found[1] == found[2]
    assert int(found[1]) >= (5000 if each > 10 else 50)


@pytest.mark.full
@pytest.mark.skipif(not aiperf.IS_THERE, reason=aiperf.WHY)
@pytest.mark.parametrize("extra", [[], ["--download-video-content"]])
def test_aiperf_measures_the_server(server: Running, tmp_path: Path, extra: list[str]):
    words = ["--request-count", "4", "--concurrency", "2", "--extra-inputs", "size:48x32", *extra]
    rows = [{"text": "a red ball moving left"}]
    found = aiperf.measured(server.url, rows, words, folder=tmp_path)
    assert found["request_count"]["avg"] == 4
    assert found["video_inference_time"]["min"] > 0
