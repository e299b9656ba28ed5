"""Load generators that others wrote agree with ours on one server: MLPerf's LoadGen and AIPerf."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastvideo_inference.goodput.bench import Bench
from fastvideo_inference.goodput.load import Server
from fastvideo_inference.goodput.plan import Slo
from fastvideo_inference.goodput.simulate import arrivals

from fastvideo import VideoPipeline
from tests import aiperf
from tests.serving import Running, config_of

pytestmark = pytest.mark.full

CLIP = {"size": "48x32", "num_frames": 9, "num_inference_steps": 30, "guidance_scale": 1, "seed": 1}
PROMPT = "a red ball moving left"
COUNT = 80


@pytest.fixture
def server(tiny_folder: Path, tmp_path: Path) -> Iterator[Running]:
    one = Running(config_of(tiny_folder, tmp_path / "served"))
    yield one
    one.stop()


def bench_of(server: Running, folder: Path, *, slo_s: float, count: int = COUNT) -> Bench:
    given: Any = (Server(server.url), CLIP, [PROMPT], Slo(slo_s))
    bench = Bench(*given, num_frames=CLIP["num_frames"], folder=folder, count=count)  # type: ignore[arg-type]
    bench.begin()
    return bench


def alone_s(server: Running, folder: Path) -> float:
    return bench_of(server, folder, slo_s=60.0).run("single").score.latency_s["p50"]


def loadgen_result(server: Running, folder: Path, *, rate: float, slo_s: float, count: int) -> str:
    """Return VALID or INVALID of LoadGen's Server scenario, which calls the Python API."""
    loadgen = pytest.importorskip("mlperf_loadgen")
    pipe = VideoPipeline.connect(server.url)
    fields = {k: v for k, v in CLIP.items() if k != "size"} | {"width": 48, "height": 32}
    failed: list[BaseException] = []

    def answer(query: Any) -> None:
        try:
            assert len(pipe(PROMPT, **fields).frames) == CLIP["num_frames"]
        except BaseException as error:
            failed.append(error)
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query.id, 0, 0)])

    def issue(queries: list[Any]) -> None:
        for query in queries:
            threading.Thread(target=answer, args=(query,)).start()

    settings = loadgen.TestSettings()
    settings.scenario, settings.mode = loadgen.TestScenario.Server, loadgen.TestMode.PerformanceOnly
    settings.server_target_qps = rate
    settings.server_target_latency_ns = int(1e9 * slo_s)
    settings.server_target_latency_percentile = 0.9
    settings.min_duration_ms, settings.min_query_count = 1000, count
    settings.max_query_count = count
    logs = loadgen.LogSettings()
    folder.mkdir()
    logs.log_output.outdir, logs.enable_trace = str(folder), False
    under_test = loadgen.ConstructSUT(issue, lambda: None)
    samples = loadgen.ConstructQSL(1, 1, lambda _: None, lambda _: None)
    try:
        loadgen.StartTestWithLogSettings(under_test, samples, settings, logs)
    finally:
        loadgen.DestroyQSL(samples)
        loadgen.DestroySUT(under_test)
    assert not failed, failed
    found = re.search(r"Result is : (\w+)", (folder / "mlperf_log_summary.txt").read_text())
    assert found
    return found[1]


def test_loadgen_calls_the_python_api_and_is_valid_where_bench_serve_passes(
    server: Running, tmp_path: Path
):
    own_s = alone_s(server, tmp_path / "alone")
    rate = 0.35 / own_s
    for slo_s, count, result in ((12 * own_s, COUNT, "VALID"), (own_s / 2, 20, "INVALID")):
        bench = bench_of(server, tmp_path / f"{result}-bench", slo_s=slo_s, count=count)
        assert bench.run("server", rate=rate).passes(bench.slo) == (result == "VALID")
        folder = tmp_path / result
        found = loadgen_result(server, folder, rate=rate, slo_s=slo_s, count=count)
        assert found == result


@pytest.mark.skipif(not aiperf.IS_THERE, reason=aiperf.WHY)
def test_aiperf_counts_as_many_good_requests_at_the_same_times(server: Running, tmp_path: Path):
    """Ours is run before and after it, for the machine may be busier in either."""
    own_s = alone_s(server, tmp_path / "alone")
    rate, slo_s = 0.6 / own_s, 2 * own_s
    times, own = arrivals(rate, COUNT, seed=0), list[tuple[float, float]]()

    def ours(name: str) -> None:
        samples = bench_of(server, tmp_path / name, slo_s=slo_s).run("server", rate=rate).samples
        assert [one.due_s for one in samples] == times
        num_frames = CLIP["num_frames"]
        good = sum(one.latency_s <= slo_s and one.frames == num_frames for one in samples)
        own.append((good / COUNT, good / max(one.sent_s + one.latency_s for one in samples)))

    ours("before")
    words = ["--fixed-schedule", "--download-video-content"]
    words += ["--goodput", f"request_latency:{1000 * slo_s:g}"]
    words += [word for k, v in CLIP.items() for word in ("--extra-inputs", f"{k}:{v}")]
    rows = [{"text": PROMPT, "timestamp": round(1000 * at_s)} for at_s in times]
    (folder := tmp_path / "aiperf").mkdir()
    found = aiperf.measured(server.url, rows, words, folder=folder)
    assert found["request_count"]["avg"] == COUNT
    ours("after")
    (low, low_per_s), (high, high_per_s) = sorted(own)
    assert low - 0.15 <= found["good_request_fraction"]["avg"] <= high + 0.15
    assert 0.75 * low_per_s <= found["goodput"]["avg"] <= 1.25 * high_per_s
