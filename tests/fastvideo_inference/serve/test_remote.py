"""Our own clients: the pipeline of a server, its jobs, and `generate --server`."""

from __future__ import annotations

import hashlib
import http.client
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastvideo_inference import remote
from fastvideo_inference.pipeline import VideoPipeline
from fastvideo_inference.recipe import read_recipe
from fastvideo_inference.remote import BusyError, PreviewImage, RemotePipeline

from fastvideo import media
from fastvideo.cli import main
from fastvideo.sampling import GenerateRequest
from fastvideo.stages import Progress
from tests.serving import BALL, LONG, Running, Start

SMALL = {"num_frames": 5, "num_inference_steps": 1, "seed": 3}


@pytest.fixture
def pipe(server: Running, monkeypatch: pytest.MonkeyPatch) -> RemotePipeline:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which is not for servers of ours
    return VideoPipeline.connect(f"{server.url}/v1/")


def test_a_call_returns_the_clip_that_the_same_call_makes_here(
    pipe: RemotePipeline, tiny_folder: Path, tmp_path: Path
):
    here = VideoPipeline.from_pretrained(tiny_folder)("a red ball", **SMALL)
    there = pipe("a red ball", **SMALL)
    assert there.frames_sha256 == here.frames_sha256
    assert there.recipe["request"] == here.recipe["request"]
    saved, own = there.save(tmp_path / "there.mp4"), here.save(tmp_path / "here.mp4")
    assert read_recipe(saved).model_dump(mode="json") == there.recipe
    assert np.array_equal(there.frames, media.read_video(saved)[0]), "decoded, thus lossy"
    assert there.fps == here.fps
    assert media.read_facts(saved) == media.read_facts(own)
    with pytest.raises(FileExistsError):
        there.save(saved)
    assert there.save(saved, overwrite=True) == saved


def test_lists_counts_and_short_names_are_taken_as_here(pipe: RemotePipeline):
    clips = pipe(["a red ball", "a blue square"], steps=1, num_frames=5, seed=7, count=2)
    asked = [(one.recipe["request"]["prompt"], one.recipe["request"]["seed"]) for one in clips]
    assert asked == [(p, s) for p in ("a red ball", "a blue square") for s in (7, 8)]
    small = {"steps": 1, "num_frames": 5}
    several = pipe("a red ball", seed=[1, 5], num_videos_per_prompt=2, **small)
    assert [one.recipe["request"]["seed"] for one in several] == [1, 2, 5, 6]
    assert isinstance(pipe("a red ball", seed=range(3, 4), **small), list)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"output": "latents"}, "output"),
        ({"latents": np.zeros(1)}, "latents"),
        ({"callback_on_step_end": print}, "callback_on_step_end"),
        ({"backend": "sdpa"}, "backend"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 6}, "num_frames"),
        ({"width": 10**5, "height": 16}, "width"),
        ({"lora": ["/etc/passwd"]}, "lora"),
        ({"nun_frames": 5}, "num_frames"),
        ({"negative_prompt_embeds": 1}, "negative_prompt"),
    ],
)
def test_what_a_server_does_not_do_is_a_value_error(
    pipe: RemotePipeline, fields: dict[str, Any], word: str
):
    with pytest.raises(ValueError, match=word):
        pipe("a red ball", **fields)


def test_a_server_says_what_it_offers(pipe: RemotePipeline, tiny_folder: Path):
    offers = pipe.offers()
    (model,) = offers["data"]
    assert model["id"] == tiny_folder.name
    assert model["defaults"]["num_frames"] == 9
    assert model["stride"] == {"num_frames": 4, "height": 16, "width": 16}
    assert not model["is_distilled"]
    assert (offers["lora"], model["decoder"]) == ([], [])
    assert offers["slo_class"][0]["deadline_s"] is None
    assert offers["limits"]["num_inference_steps"] == 100


def test_requests_of_a_call_have_seeds_of_their_own(pipe: RemotePipeline):
    assert [one.seed for one in pipe.requests("a red ball", count=3, seed=5)] == [5, 6, 7]
    with pytest.raises(ValueError, match="seed"):
        pipe.requests("a red ball", count=2, seed=2**63 - 1)


def test_a_job_tells_its_progress_and_gives_its_clip(pipe: RemotePipeline):
    job = pipe.submit("a red ball", num_inference_steps=3, num_frames=5, previews=True)
    events = list(job.events())
    assert job.status == "completed"
    steps = [e.index for e in events if isinstance(e, Progress) and e.stage == "denoise"]
    assert steps == sorted(steps)
    assert steps[-1] == 3
    previews = [e.png for e in events if isinstance(e, PreviewImage)]
    assert all(png.startswith(b"\x89PNG") for png in previews)
    assert job.queue_position is None
    assert job.result().frames.shape[0] == 5


def test_a_cancelled_job_has_no_clip_and_a_failed_one_says_why(
    pipe: RemotePipeline, server: Running
):
    job = pipe.submit(**LONG)
    job.cancel()
    job.cancel()
    assert server.ask("GET", f"/v1/videos/{job.id}")[0] == 404
    with pytest.raises((RuntimeError, ValueError)):
        job.result()
    job = pipe.submit(**{**LONG, "num_inference_steps": 20})
    Path(server.folder, f"{job.id}.mp4", "in the way").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="cannot be published: "):
        job.result()
    assert job.values["error"]["code"] == "io_error"


def test_a_clip_that_could_not_be_fetched_or_saved_stays_on_the_server(
    pipe: RemotePipeline, server: Running, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "_RETRY_S", 0.01)
    open_, lost = remote.Connection.open, []

    @contextmanager
    def once(connection: remote.Connection, method: str, path: str, *rest: Any, **how: Any):
        if path.endswith("/content") and not lost:
            lost.append(path)
            raise BusyError("restarting", retry_after_s=1.0, is_full=False)
        with open_(connection, method, path, *rest, **how) as answer:
            yield answer

    monkeypatch.setattr(remote.Connection, "open", once)
    assert pipe("a red ball", **SMALL).frames.shape[0] == 5
    assert lost
    jobs = pipe.jobs([GenerateRequest(prompt="a red ball", **SMALL)])
    job = next(jobs)
    job.result(decode=False)
    jobs.close()  # as after a full disk
    assert server.ask("GET", f"/v1/videos/{job.id}")[2]["status"] == "completed"


def test_an_interrupt_amid_a_request_cancels_the_job_that_it_made(
    pipe: RemotePipeline, server: Running, monkeypatch: pytest.MonkeyPatch
):
    read, begun = http.client.HTTPConnection.getresponse, []

    def once(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        answer = read(connection)
        if not begun:
            begun.append(json.loads(answer.read())["id"])
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", once)
    with pytest.raises(KeyboardInterrupt):
        pipe.submit(**LONG)
    assert server.ask("GET", f"/v1/videos/{begun[0]}")[0] == 404


def test_a_job_whose_answer_is_lost_is_asked_for_once(
    pipe: RemotePipeline, server: Running, monkeypatch: pytest.MonkeyPatch
):
    before = len(server.ask("GET", "/v1/videos?limit=100")[2]["data"])
    read, lost = http.client.HTTPConnection.getresponse, []

    def once(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        answer = read(connection)
        if not lost:
            lost.append(answer.read())
            raise http.client.RemoteDisconnected
        return answer

    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", once)
    job = pipe.submit("a red ball", **SMALL)
    assert job.id == json.loads(lost[0])["id"]
    assert len(server.ask("GET", "/v1/videos?limit=100")[2]["data"]) == before + 1


def test_a_full_queue_a_wrong_key_and_no_server_are_told_apart(start: Start):
    digest = hashlib.sha256(b"sk-a").hexdigest()
    server = start(key=[{"name": "a", "sha256": digest, "running": 1}])
    pipe = VideoPipeline.connect(server.url, api_key="sk-a")
    job = pipe.submit(**LONG)
    with pytest.raises(BusyError) as busy:
        pipe.submit(**BALL)
    assert busy.value.retry_after_s >= 1
    job.cancel()
    with pytest.raises(PermissionError):
        VideoPipeline.connect(server.url, api_key="sk-b").submit("a red ball")
    with pytest.raises(ConnectionError):
        VideoPipeline.connect("http://127.0.0.1:9").submit("a red ball")
    with pytest.raises(ValueError, match="ftp"):
        VideoPipeline.connect("ftp://127.0.0.1")


def test_a_server_that_dies_amid_a_clip_is_told_in_one_line(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.setattr(remote, "_RECONNECT_S", 0.0)
    server = start()
    words = [
        "--steps=100",
        "--count=50",
        f"--server={server.url}",
        "-o",
        f"{tmp_path}/{{seed}}.mp4",
    ]
    timer = threading.Timer(1.0, server.stop)
    timer.start()
    assert main(["generate", "a red ball", *words]) == 1
    timer.join()
    assert "does not answer" in capsys.readouterr().err


def test_a_client_outlives_losses_that_are_far_apart(
    pipe: RemotePipeline, monkeypatch: pytest.MonkeyPatch
):
    now_s, losses, read = [0.0], [1000.0, 1000.0], remote._server_sent

    def lost(lines: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
        if losses:
            yield "status", {"status": "queued"}
            now_s[0] += losses.pop()
            raise ConnectionResetError
        yield from read(lines)

    clock = SimpleNamespace(monotonic=lambda: now_s[0], sleep=lambda _: None)
    monkeypatch.setattr(remote, "time", clock)
    monkeypatch.setattr(remote, "_server_sent", lost)
    assert pipe.submit(**BALL).result().frames_sha256
    assert not losses


def test_a_redirect_does_not_get_the_key():
    seen = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers["authorization"]))
            self.send_response(307 if self.path == "/a" else 200)
            self.send_header("location", f"http://localhost:{self.server.server_port}/b")
            self.end_headers()
            self.wfile.write(b"{}")

    with HTTPServer(("127.0.0.1", 0), Redirecting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert remote.Connection(url, api_key="sk-a").json("GET", "/a") == {}
        server.shutdown()
        thread.join()
    assert seen == [("/a", "Bearer sk-a"), ("/b", None)]


def test_generate_writes_clip_sidecar_and_lines_as_without_a_server(
    server: Running, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    unused = ["--guidance=1", "--negative=a blue square"]  # which a notice tells
    words = ["--steps=1", "--frames=5", "--seed=4", "--count=2", "--json", *unused]
    asked = ["generate", "a red ball", *words]
    told, said, beside = [], [], []
    for name, where in (("here", f"--model={tiny_folder}"), ("there", f"--server={server.url}")):
        assert main([*asked, where, "-o", f"{tmp_path}/{name}-{{seed}}.mp4"]) == 0
        written = capsys.readouterr()
        told.append([json.loads(line) for line in written.out.splitlines()])
        said.append({line for line in written.err.splitlines() if "negative_prompt" in line})
        beside.append(json.loads((tmp_path / f"{name}-5.json").read_text()))
    here, there = beside
    assert here.keys() == there.keys()
    assert here["frames_sha256"] == there["frames_sha256"]
    assert here["recipe"]["request"] == there["recipe"]["request"]
    for one in told:
        kinds = [line["event"] for line in one if line["event"] not in ("progress", "notice")]
        assert kinds == ["start", "saved"] * 2
    assert here["notices"] == there["notices"] != []
    assert said[0] == said[1] != set()
    assert [line["text"] for line in told[1] if line["event"] == "notice"] == there["notices"] * 2
    again = [f"--from={tmp_path}/there-5.mp4", f"--server={server.url}"]
    assert main(["generate", *again, "-o", f"{tmp_path}/again.mp4"]) == 0
    repeated = json.loads((tmp_path / "again.json").read_text())
    assert repeated["frames_sha256"] == there["frames_sha256"]


@pytest.mark.parametrize(
    "words",
    [
        *(["--steps=1001"], ["--frames=6"], ["--device=cpu"], ["--backend=sdpa"]),
        *(["--model=sora-2"], ["--set", "attention=dense"], ["--set", "drop_gates=true"]),
    ],
)
def test_generate_ends_with_2_for_what_is_refused_here_or_there(
    server: Running, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
):
    output = ["-o", str(tmp_path / "a.mp4"), "--server", server.url]
    assert main(["generate", "a red ball", *words, *output]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_generate_ends_with_1_if_there_is_no_server_and_reads_its_key_from_a_file(
    start: Start, tmp_path: Path
):
    asked = ["generate", "a red ball", "--steps=1", "--frames=5", "-o", str(tmp_path / "a.mp4")]
    assert main([*asked, "--server=http://127.0.0.1:9"]) == 1
    digest = hashlib.sha256(b"sk-a").hexdigest()
    server = start(key=[{"name": "a", "sha256": digest}])
    (tmp_path / "key").write_text("sk-a\n")
    assert main([*asked, "--server", server.url]) == 1
    assert main([*asked, "--server", server.url, "--api-key", f"@{tmp_path / 'key'}"]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_generate_that_is_interrupted_cancels_its_jobs_and_leaves_nothing(
    server: Running, tmp_path: Path, number: int, code: int, interruptible: None
):
    words = ["a red ball", "--steps=100", "--count=3", "--json", "-o", f"{tmp_path}/{{seed}}.mp4"]
    command = [sys.executable, "-m", "fastvideo", "generate", *words, "--server", server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        seen = iter(run.stdout)
        while json.loads(next(seen))["event"] != "progress":
            pass
        run.send_signal(number)
        assert run.wait(60) == code
    listed = server.ask("GET", "/v1/videos?limit=100")[2]["data"]
    assert not [job for job in listed if job["num_inference_steps"] == 100]
    assert not list(tmp_path.iterdir())
