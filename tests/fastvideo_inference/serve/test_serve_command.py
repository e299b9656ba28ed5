"""`fastvideo serve` as it is typed: its config, its processes and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fastvideo_inference.commands import serve as command
from fastvideo_inference.serve import config as configs
from fastvideo_inference.serve.catalogue import Catalogue

from fastvideo import hub
from fastvideo.cli import main
from tests.processes import has_ended
from tests.serving import BALL, LONG

T = TypeVar("T")
ROOT = Path(__file__).parents[3]
GROUP = '[[worker]]\ndevices = ["cpu", "cpu"]\nparallel = "ulysses=2"\n'


@contextmanager
def typed(*words: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Type `fastvideo serve` and yield the process and its URL."""
    log = dict(os.environ, FASTVIDEO_LOG="info", PYTHONPATH=os.pathsep.join(sys.path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    typed = [sys.executable, "-m", "fastvideo", "serve", "--port=0", *words]
    with subprocess.Popen(typed, cwd=cwd, env=log, **pipes) as run:
        try:
            assert run.stdout is not None
            yield run, run.stdout.readline().strip()
        finally:
            run.kill()


def ask(url: str, values: dict[str, Any] | None = None, *, key: str = "") -> dict[str, Any]:
    body = None if values is None else json.dumps(values).encode()
    headers = {"content-type": "application/json", **({"idempotency-key": key} if key else {})}
    request = urllib.request.Request(url, body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


def wait_for(ask: Callable[[], T]) -> T:
    """Return the first answer that is not empty."""
    deadline = time.monotonic() + 60
    while not (answer := ask()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.full)],
)
@pytest.mark.usefixtures("interruptible")
def test_a_server_of_processes_makes_a_clip_drains_and_leaves_no_process(
    tiny_folder: Path, tmp_path: Path, number: int, code: int
):
    (tmp_path / "a.toml").write_text(f'[[worker]]\nmodel = "{tiny_folder}"\ndevices = ["cpu"]\n')
    with typed("--config=a.toml", cwd=tmp_path) as (run, url):
        job = ask(f"{url}/v1/videos", BALL)
        workers = [
            int(p) for p in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        ]
        assert workers
        assert "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text(), "only they load it"
        wait_for(lambda: ask(f"{url}/v1/videos/{job['id']}")["status"] == "completed")
        begun = ask(f"{url}/v1/videos", LONG)["id"]
        wait_for(lambda: ask(f"{url}/v1/videos/{begun}")["status"] == "in_progress")
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(b"no HTTP\r\n\r\n")
            assert client.recv(99).startswith(b"HTTP/1.1 400 ")
        run.send_signal(number)
        _, err = run.communicate(timeout=60)
    assert run.returncode == code
    assert all(has_ended(pid) for pid in workers)
    assert "is ready" in err
    assert "no more jobs are accepted" in err
    assert any("WARNING [-] Invalid HTTP" in line for line in err.splitlines())
    posts = [line for line in err.splitlines() if "POST '/v1/videos' 200" in line]
    assert len(posts) == 2
    assert all("[req_" in line for line in posts)
    made = {path.stem for path in (tmp_path / "outputs" / "serve").rglob("*.mp4")}
    assert made == {job["id"], begun}, "what was begun is finished"


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_server_of_processes_outlives_clients_and_a_worker_repeats_no_clip_and_bounds_its_queue(
    tiny_folder: Path, tmp_path: Path
):
    config = f'[[class]]\nqueue = 1\n[[worker]]\nmodel = "{tiny_folder}"\ndevices = ["cpu"]\n'
    (tmp_path / "a.toml").write_text(config)
    with typed("--config=a.toml", cwd=tmp_path) as (run, url):
        body = json.dumps(BALL)
        head = "POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"idempotency-key: once\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall((head + body).encode())  # and is gone before the answer
        jobs = wait_for(lambda: ask(f"{url}/v1/videos")["data"])
        repeated = [ask(f"{url}/v1/videos", BALL, key="once")["id"] for _ in range(2)]
        assert repeated == [jobs[0]["id"]] * 2
        path = f"{url}/v1/videos/{repeated[0]}"
        with urllib.request.urlopen(f"{path}/events", timeout=60) as following:
            following.readline()
        wait_for(lambda: ask(path)["status"] == "completed")
        assert len(ask(f"{url}/v1/videos")["data"]) == 1
        with pytest.raises(urllib.error.HTTPError) as refused:
            [ask(f"{url}/v1/videos", LONG) for _ in range(20)]
        assert refused.value.code == 429
        assert int(refused.value.headers["retry-after"]) >= 1
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        wait_for(
            lambda: b"worker_deaths_total 1" in urllib.request.urlopen(f"{url}/metrics").read()
        )
        run.terminate()
        run.terminate()
        _, err = run.communicate(timeout=60)
    assert re.search(r"WARNING \[(video_\w+)\] worker \S+, at \1, is replaced", err), err


@pytest.mark.full
def test_a_client_gets_all_its_clips_from_a_server_that_is_killed_and_started_again(
    tiny_folder: Path, tmp_path: Path
):
    (tmp_path / "a.toml").write_text(f'[[worker]]\nmodel = "{tiny_folder}"\ndevices = ["cpu"]\n')
    asked = [*("generate", "a red ball", "--steps=60", "--seed=1", "--count=3"), "--frames=9"]
    assert main([*asked, f"--model={tiny_folder}", "-o", f"{tmp_path}/own-{{seed}}.mp4"]) == 0
    with typed("--config=a.toml", cwd=tmp_path) as (server, url):
        words = [*asked, "--json", "--server", url, "-o", f"{tmp_path}/{{seed}}.mp4"]
        client = [sys.executable, "-m", "fastvideo", *words]
        with subprocess.Popen(client, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            seen = map(json.loads, run.stdout)
            assert any(one["event"] == "progress" and one["index"] == 20 for one in seen)
            server.kill()
            server.wait()
            port = url.rpartition(":")[2]
            with typed("--config=a.toml", f"--port={port}", cwd=tmp_path):
                rest, _ = run.communicate(timeout=120)
    assert run.returncode == 0, rest
    for seed in (1, 2, 3):
        made, own = (json.loads((tmp_path / f"{p}{seed}.json").read_text()) for p in ("", "own-"))
        assert made["frames_sha256"] == own["frames_sha256"]
    published = (tmp_path / "outputs" / "serve").rglob("*.mp4")
    assert len(list(published)) == 3


@pytest.mark.parametrize(
    "path", sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("configs/serve/*.toml"))
)
def test_the_configs_that_come_with_it_are_right(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert main(["serve", "--config", path, "--check"]) == 0


def test_a_key_without_a_class_is_of_the_first_one(tmp_path: Path):
    (tmp_path / "a.toml").write_text(f'[[key]]\nname = "a"\nsha256 = "{"0" * 64}"\n')
    assert main(["serve", "--config", str(tmp_path / "a.toml"), "--check"]) == 0


def test_without_a_config_all_bundled_models_are_offered_the_default_one_first():
    models = list(Catalogue(configs.read(None)).models)
    assert models[0] == hub.DEFAULT_MODEL
    assert sorted(models) == hub.bundled()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('polcy = "fifo"', ":1 is unknown; did you mean 'policy'"),
        ('policy = "fastest"', "policy 'fastest'"),
        ('[[worker]]\nstages = ["denoise"]', "worker.stages: no worker runs encode_text"),
        ('[[worker]]\ndevices = ["cpu:0", "cpu:1"]\nparallel = "ulysses=4"', "worker.parallel"),
        ('[[worker]]\ndevices = ["cpu:0", "cpu:1"]\nparallel = "data=2"', "use count"),
        ('[[worker]]\ndevices = ["tpu"]', "worker.devices 'tpu'"),
        ('[[worker]]\nmodel = "no-such"', "model 'no-such'"),
        ('[[worker]]\nstages = ["decoed"]', "'decoed' is unknown; did you mean 'decode'"),
        ('[[worker]]\ndevices = ["cpu:4096"]', "'cpu:4096': this machine has"),
        (f'executor = "local"\n{GROUP}', "'local' has one process"),
        ("worker = []", "worker"),
        ("class = []", "class"),
        ("[limits]\noutput_ttl_s = 0", "limits.output_ttl_s 0"),
        (f'[[key]]\nname = ""\nsha256 = "{"0" * 64}"', "key.0.name"),
        ('[[class]]\nname = "a"\n[[class]]\nname = "a"', "class.name 'a'"),
        (f'[[key]]\nname = "a"\nclass = "b"\nsha256 = "{"0" * 64}"', "key.class 'b'"),
        ('[[key]]\nname = "a"\nsha256 = "sk-a"', "key.0.sha256"),
        ('[lora]\na = "/no/such.safetensors"', "/no/such"),
        ('[decoder]\na = "/no/such"', "decoder.a"),
        ("checkpoint_every = 0", "checkpoint_every 0"),
        ("[limits]\nwidht = 1", "limits.widht"),
        ("[[worker]", "not valid TOML"),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_field(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.toml").write_text(text)
    assert main(["serve", "--config", str(tmp_path / "a.toml"), "--check"]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_check_is_of_the_executor_that_is_typed(tmp_path: Path):
    (tmp_path / "a.toml").write_text(GROUP)
    words = ["serve", "--config", str(tmp_path / "a.toml"), "--check"]
    assert [main([*words, f"--executor={one}"]) for one in ("local", "process")] == [2, 0]


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_the_name_that_it_listens_at_is_one_of_its_hosts(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(command, "_serve", lambda *words, **_: seen.extend(words) or 0)
    assert main(["serve", "--host=localhost", "--port=0", "--executor=local"]) == 0
    config, listener = seen
    listener.close()
    assert (config.hosts, config.executor) == (("localhost",), "local")


def test_without_the_extra_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else name)
    assert main(["serve", "--check"]) == 2
    err = capsys.readouterr().err
    assert "uvicorn" in err
    assert "fastvideo[serve]" in err
