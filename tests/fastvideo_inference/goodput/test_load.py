"""Load on a real server of the tiny model, and what is counted of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastvideo_inference.goodput import bench as benches
from fastvideo_inference.goodput import load
from fastvideo_inference.goodput.bench import Bench, Run
from fastvideo_inference.goodput.load import Sample, Server, score
from fastvideo_inference.goodput.plan import Slo

from fastvideo import cli
from tests.serving import BALL, Running, config_of

FIELDS = {**BALL, "num_frames": 5}
SLO = Slo(deadline_s=60.0)


@pytest.fixture
def server(tiny_folder: Path, tmp_path: Path) -> Iterator[Running]:
    one = Running(config_of(tiny_folder, tmp_path / "served", **{"class": [{"queue": 2}]}))
    yield one
    one.stop()


def bench_of(server: Running, folder: Path, **changes: object) -> Bench:
    values = {
        "server": Server(server.url),
        "request": {k: v for k, v in FIELDS.items() if k != "prompt"},
        "prompts": ["a red ball", "a blue ball"],
        "slo": SLO,
        "num_frames": 5,
        "folder": folder,
        "count": 10,
        "poll_s": 0.02,
        **changes,
    }
    return Bench(**values)  # type: ignore[arg-type]


def test_requests_are_good_in_time_and_whole_and_a_run_is_not_made_again(
    server: Running, tmp_path: Path
):
    bench = bench_of(server, tmp_path / "bench")
    bench.begin()
    run = bench.run("server", rate=5.0)
    assert run.is_complete
    assert run.score.attempted == 9
    assert run.score.statuses.keys() <= {"completed", "rejected"}
    done = [s for s in run.samples if s.status == "completed"]
    assert all(s.frames == 5 and s.latency_s >= s.server["total"] > 0 for s in done)
    assert {"stage.encode_text", "stage.denoise", "stage.decode", "queue"} <= done[0].server.keys()
    server.stop()
    again = bench_of(server, tmp_path / "bench")
    again.begin()
    assert again.run("server", rate=5.0) == run
    other = bench_of(server, tmp_path / "bench", count=11)
    with pytest.raises(ValueError, match="another bench"):
        other.begin()


def test_a_burst_beyond_the_queue_counts_as_missed(server: Running, tmp_path: Path):
    long = {"num_frames": 5, "num_inference_steps": 50, "guidance_scale": 1, "seed": 1}
    bench = bench_of(server, tmp_path / "bench", request=long)
    bench.begin()
    run = bench.run("offline")
    rejected = run.score.statuses["rejected"]
    assert rejected > 0
    assert run.score.untimed_rejects == 0, "each 429 says when it would fit"
    assert run.score.attainment == pytest.approx(1 - rejected / run.score.attempted)


def test_a_server_that_is_gone_ends_a_bench_with_what_was_measured(server: Running, tmp_path: Path):
    bench = bench_of(server, tmp_path / "bench")
    bench.begin()
    single = bench.run("single")
    server.stop()
    run = bench.run("server", rate=100.0)
    assert single.is_complete
    assert not run.is_complete
    assert not list((tmp_path / "bench").glob("server-*"))
    assert benches.goodput([single, run], SLO) == 0.0


def test_the_command_writes_what_it_found_also_of_a_server_that_died(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "bench"
    words = ["bench", "serve", server.url, "--slo", "60", "--frames", "5", "--count", "10"]
    words += ["--set", "seed=1", "--set", "guidance_scale=1", "-o", str(folder)]
    assert cli.main([*words, "--rate", "120", "--offline"]) == 0
    table = json.loads((folder / "table.json").read_text())
    assert [run["mode"] for run in table["runs"]] == ["single", "server", "offline"]
    assert table["is_complete"] and table["goodput_per_s"] == 2.0 and table["poll_s"] == 0.1
    assert all(run["attainment_3x"] is not None for run in table["runs"][1:])
    assert {"p50", "p95", "p99"} <= table["runs"][1]["server_s"]["queue"].keys()
    assert "<polyline" in (folder / "attainment.svg").read_text()
    other = [*words[:5], "--frames", "6", "-o", str(tmp_path / "other")]
    assert cli.main(other) == 1
    assert "incomplete: ValueError: num_frames 6 must be" in capsys.readouterr().out
    server.stop()
    assert cli.main([*words, "--rate", "120", "--rate", "240"]) == 1
    table = json.loads((folder / "table.json").read_text())
    assert [run["is_complete"] for run in table["runs"]] == [True, True, False]
    assert not table["is_complete"] and table["goodput_per_s"] == 2.0
    assert "incomplete: server is gone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--slo -1", "deadline -1"),
        ("--slo 5 --rate -3", "rate -3"),
        ("--slo 5 --poll 0", "poll 0"),
        ("--slo 5 --burst -1", "burst -1"),
        ("--slo 5 --burst nan", "burst nan"),
        ("--slo 5 --burst inf", "burst inf"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    words: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = ["bench", "serve", "http://127.0.0.1:9", "--frames", "5", *words.split()]
    assert cli.main([*given, "-o", str(tmp_path / "bench")]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1


class Limited(Bench):
    """A bench of a server that is good up to a rate, without the server."""

    def run(self, mode: Any, *, rate: float = 0.0, alone_s: float | None = None) -> Run:
        samples = [made(float(i), 0.5 if rate <= 3.3 else 99.0) for i in range(10)]
        return Run(mode, rate, tuple(samples), score(samples, SLO, num_frames=5), True)


def test_bisection_begins_at_one_clip_after_another_and_ends_at_the_highest_rate_that_passes(
    tmp_path: Path,
):
    given: Any = (Server("http://127.0.0.1:9"), {}, ["a ball"], SLO)
    single, *runs = Limited(*given, num_frames=5, folder=tmp_path).runs()
    assert (single.mode, runs[0].rate, runs[1].rate) == ("single", 2.0, 4.0)
    found = benches.goodput(runs, SLO)
    assert found <= 3.3 < found / (1 - 0.05)
    assert len(runs) < 10


def test_another_number_of_frames_is_no_good_clip(server: Running):
    (sample,) = load.send(Server(server.url), [FIELDS], [0.0], poll_s=0.02)
    assert score([sample], SLO, num_frames=5).attainment == 1.0
    found = score([sample], SLO, num_frames=9)
    assert (found.attainment, found.invalid) == (0.0, 1)


def made(sent_s: float, latency_s: float, status: str = "completed") -> Sample:
    return Sample(sent_s, sent_s, status, latency_s, frames=5 * (status == "completed"))


def test_a_refused_request_is_wrongly_so_if_a_later_one_was_done_before_its_deadline():
    slo = Slo(deadline_s=10.0)
    refused = made(0.0, 0.01, "rejected")
    assert score([refused, made(1.0, 5.0)], slo, num_frames=5).wrong_rejects == 1
    assert score([refused, made(1.0, 9.5)], slo, num_frames=5).wrong_rejects == 0
    assert score([made(-1.0, 5.0), refused], slo, num_frames=5).wrong_rejects == 0


def test_shares_are_of_attempted_requests_after_the_first_tenth():
    slow = [made(i, 20.0) for i in range(2)]
    rest = [made(i + 2, 5.0) for i in range(14)] + [
        made(20, 12.0),
        made(21, 0.1, "rejected"),
        made(22, 1.0, "failed"),
        made(23, 29.0),
    ]
    found = score([*slow, *rest], Slo(deadline_s=10.0), num_frames=5, alone_s=9.0)
    assert found.attempted == 18
    assert found.attainment == pytest.approx(14 / 18)
    assert found.attainment_3x == pytest.approx(15 / 18)
    assert found.late_accepts == 2
    assert found.latency_s["p50"] == 5.0
    assert found.latency_s["p99"] == 29.0


@pytest.mark.parametrize(
    "answer",
    [
        *([], {"id": "a"}, {"id": "a", "status": "failed", "error": "boom"}),
        {"id": "a", "status": "completed", "stage_seconds": {"denoise": None}},
        {"id": "a", "status": "completed", "accepted_at_s": "x", "finished_at_s": "y"},
    ],
)
def test_whatever_a_server_answers_a_request_has_an_end(answer: Any):
    class Odd(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Odd) as odd:
        thread = threading.Thread(target=odd.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{odd.server_port}"
        (sample,) = load.send(Server(url), [FIELDS], [0.0], poll_s=0.02)
        odd.shutdown()
        thread.join()
    assert sample.status == "failed"


def test_a_run_that_is_incomplete_does_not_pass():
    samples = [made(float(i), 0.5) for i in range(10)]
    run = Run("server", 1.0, tuple(samples), score(samples, SLO, num_frames=5), False)
    assert run.score.attainment == 1.0
    assert not run.passes(SLO)


def test_all_clips_of_an_offline_run_count():
    samples = [replace(made(0.0, float(i + 1)), due_s=0.0) for i in range(20)]
    found = score(samples, SLO, num_frames=5, warm_up=0.0)
    assert (found.attempted, found.throughput_per_s) == (20, 1.0)


def test_latency_runs_from_a_request_s_own_post(server: Running):
    first, second = load.send(Server(server.url), [FIELDS], [0.0, 1.5], poll_s=0.02)
    assert second.sent_s >= 1.5 > first.sent_s
    assert second.latency_s < second.sent_s + second.latency_s - 1.4


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "", "http://a:99999", "http://a:b"])
def test_what_is_no_server_is_refused(url: str):
    with pytest.raises(ValueError, match="must look like"):
        Server(url)
