"""What nobody may do: each is answered 4xx in one line, and writes nothing outside the folder."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastvideo_inference.engine import ledger
from fastvideo_inference.serve import app, body, guard, metrics

from tests.serving import BALL, LONG, Running, Start

FORM = "multipart/form-data; boundary=b"
PART = b'--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\nx\r\n'
SECRETS = {"ann": "sk-ann", "bob": "sk-bob"}


def keys(**limits: Any) -> list[dict[str, Any]]:
    """Return the keys of two people, the first of whom has limits."""
    hashed = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in SECRETS.items()}
    return [
        {"name": "ann", "sha256": hashed["ann"], **limits},
        {"name": "bob", "sha256": hashed["bob"]},
    ]


@pytest.fixture(autouse=True)
def nothing_is_written_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have a working folder of its own, in which nothing may appear."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield
    assert not list(work.rglob("*"))


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"size": "99999999x8"}, "height"),
        ({"size": "99999999x16"}, "width"),
        ({"size": "48"}, "size"),
        ({"size": 48}, "size"),
        ({"width": -8}, "width"),
        ({"steps": 10**9}, "num_inference_steps"),
        ({"num_inference_steps": 101}, "num_inference_steps"),
        ({"num_frames": 10**18 + 1}, "num_frames"),
        ({"num_frames": 261}, "num_frames"),
        ({"num_frames": 6}, "num_frames"),
        ({"num_frames": "9.5"}, "num_frames"),
        ({"seconds": "1e9"}, "seconds"),
        ({"seconds": 10**5}, "num_frames"),
        ({"seconds": 0}, "seconds"),
        ({"seconds": [5]}, "seconds"),
        ({"seconds": True}, "seconds"),
        ({"fps": "1e999999999"}, "fps"),
        ({"guidance_scale": "inf"}, "guidance_scale"),
        ({"seed": 2**70}, "seed"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a" * 9000}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"negative_prompt": "a" * 9000}, "negative_prompt"),
        ({"model": "sora-2"}, "model"),
        ({"model": "../../etc"}, "model"),
        ({"lora": "/etc/passwd"}, "lora"),
        ({"lora": ["owner/name:0.5"]}, "lora"),
        ({"lora": ["a"] * 1000}, "lora"),
        ({"decoder": "../tiny"}, "decoder"),
        ({"slo_class": "gold"}, "slo_class"),
        ({"previews": "perhaps"}, "previews"),
        ({"backend": "sdpa"}, "backend"),
        ({"attention": "dense"}, "attention"),
        ({"drop_gates": True}, "drop_gates"),
        ({"input_reference": "http://169.254.169.254/latest"}, "input_reference"),
        ({"input_reference": {"image_url": "file:///etc/passwd"}}, "input_reference"),
        ({"output_path": "/tmp/x.mp4"}, None),
        ({"a" * 10**5: 1}, None),
        ({"!" * 64: 1}, None),
        ({"": 1}, None),
        ({"prompt": {"a": {"b": [[[[1]]]]}}}, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_absurd_or_forbidden_value_is_refused_by_its_name(server: Running, values, param):
    error = server.refused("POST", "/v1/videos", {**BALL, **values})
    assert error["status"] == (404 if param == "model" else 400)
    assert error["param"] == param
    assert error["headers"]["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("kind", "sent", "status"),
    [
        ("application/json", b"{", 400),
        ("application/json", b"[]", 400),
        ("application/json", b'{"prompt": NaN}', 400),
        ("application/json", b"[" * 10**5, 400),
        ("application/json", b"\xff\xfe", 400),
        ("application/json", b'{"seed": ' + b"9" * 5000 + b"}", 400),
        ("application/json", b"", 400),
        ("application/json", b" " * (2 << 20), 413),
        ("text/plain", b"prompt=x", 415),
        ("application/x-www-form-urlencoded", b"prompt=x", 415),
        ("", b"prompt=x", 415),
        ("multipart/form-data", b"x", 400),
        (FORM, b"no boundary", 400),
        (FORM, b"--b\r\nx\r\n", 400),
        (FORM + "b" * 5000, b"--b--", 400),
        (FORM + "; charset=zzz", b"--b--\r\n", 400),
        (FORM, b"--b\r\ncontent-disposition: form-data\r\n\r\nx\r\n--b--\r\n", 400),
        (FORM, PART % b'input_reference"; filename="../../x' + b"--b--\r\n", 400),
        (FORM, PART % b"prompt" * 100 + b"--b--\r\n", 400),
        (FORM, PART % b"prompt" * 2 + b"--b--\r\n", 400),
        (FORM, b"--b\r\n" + b"x" * 10**5 + b": 1\r\n\r\n--b--\r\n", 400),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_that_is_none_is_refused(server: Running, kind: str, sent: bytes, status: int):
    error = server.refused("POST", "/v1/videos", body=sent, headers={"content-type": kind})
    assert error["status"] == status


def test_a_body_without_an_announced_length_is_refused_as_soon_as_it_is_too_long(server: Running):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        head = "POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        client.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        for _ in range(17):  # 64 KiB each; the last one is too much
            client.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "job_id",
    [
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e",
        "video_" + "0" * 32,
        "video_" + "0" * 31 + "%0a",
        "a" * 4000,
        "%00",
        "%ff",
    ],
)
@pytest.mark.parametrize("what", ["", "/content", "/events"])
def test_an_id_that_is_none_is_not_found(server: Running, job_id: str, what: str):
    for method in ("GET", "DELETE") if not what else ("GET",):
        assert server.refused(method, f"/v1/videos/{job_id}{what}")["status"] == 404


def test_unknown_paths_and_methods_are_refused_in_the_same_shape(server: Running):
    assert server.refused("GET", "/v1/images")["status"] == 404
    assert server.refused("PUT", "/v1/videos")["status"] == 405
    assert server.refused("GET", "/docs")["status"] == 404


def test_a_page_of_another_site_cannot_have_a_browser_ask(server: Running):
    headers = {"origin": "https://example.com"}
    assert server.refused("POST", "/v1/videos", BALL, headers=headers)["status"] == 403
    own = {"origin": server.url}
    assert server.ask("GET", "/v1/videos", headers=own)[0] == 200


def test_a_name_that_somebody_lets_resolve_to_this_host_is_refused_without_keys(start: Start):
    server = start(hosts=["Clips.example"])
    for host in (
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "[::1].evil",
        "[",
        "",
    ):
        headers = {"host": host, "origin": f"http://{host}"}
        assert server.refused("POST", "/v1/videos", BALL, headers=headers)["status"] == 403
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "10.0.0.7:80", "clips.EXAMPLE:8000"):
        headers = {"host": host, "origin": f"http://{host}"}
        assert server.ask("GET", "/v1/models", headers=headers)[0] == 200
    server.stop()
    headers = {"host": "evil.example", "origin": "http://evil.example"}
    assert start(key=keys()).ask("GET", "/v1/models", headers=headers, key="sk-ann")[0] == 200


def test_jobs_of_another_key_do_not_exist_and_wrong_keys_see_nothing(start: Start):
    server = start(key=keys())
    job = server.create(BALL, key="sk-ann")
    path = f"/v1/videos/{job['id']}"
    for method, where in (
        ("GET", path),
        ("DELETE", path),
        ("GET", f"{path}/content"),
        ("GET", f"{path}/events"),
    ):
        assert server.refused(method, where, key="sk-bob")["status"] == 404
        for wrong in ("", "sk-an", "sk-ann2"):
            assert server.refused(method, where, key=wrong)["status"] == 401
    assert server.ask("GET", "/v1/videos", key="sk-bob")[2]["data"] == []
    assert server.ask("GET", path, key="sk-ann")[0] == 200
    assert server.refused("POST", "/v1/videos", BALL)["status"] == 401
    assert server.refused("GET", "/v1/models")["status"] == 401
    for open_to_all in ("/healthz", "/readyz", "/metrics"):
        assert server.ask("GET", open_to_all)[0] == 200


def test_limits_of_a_key_are_429_with_the_seconds_to_wait_and_others_are_served(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    server = start(key=keys(rate=3, running=2))
    once = {"idempotency-key": "a"}
    first = server.create(LONG, key="sk-ann", headers=once)
    server.create(LONG, key="sk-ann")
    error = server.refused("POST", "/v1/videos", BALL, key="sk-ann")
    assert (error["status"], error["code"]) == (429, "running_limit")
    assert server.create(LONG, key="sk-ann", headers=once)["id"] == first["id"], "repeated is free"
    with monkeypatch.context() as later:
        later.setattr(ledger, "KEPT_S", 0.0)
        error = server.refused("POST", "/v1/videos", LONG, key="sk-ann", headers=once)
        assert error["code"] == "running_limit", "a day later it asks for another clip"
    for job in server.ask("GET", "/v1/videos", key="sk-ann")[2]["data"]:
        server.ask("DELETE", f"/v1/videos/{job['id']}", key="sk-ann")
    error = server.refused("POST", "/v1/videos", {**BALL, "count": 3}, key="sk-ann")
    assert (error["status"], error["code"]) == (429, "running_limit")
    error = server.refused("POST", "/v1/videos", {**BALL, "count": 2}, key="sk-ann")
    assert (error["status"], error["code"]) == (429, "rate_limit_exceeded")
    server.create(BALL, key="sk-ann")
    error = server.refused("POST", "/v1/videos", BALL, key="sk-ann")
    assert (error["status"], error["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(error["headers"]["retry-after"]) <= 20
    server.create(BALL, key="sk-bob")


def test_a_full_queue_costs_a_key_nothing_of_its_rate(start: Start):
    server = start(key=keys(rate=3), **{"class": [{"queue": 1}]})

    def post() -> str:
        status, _, answer = server.ask("POST", "/v1/videos", LONG, key="sk-ann")
        return answer["id"] if status == 200 else answer["error"]["code"]

    jobs: list[str] = []
    wait_until(lambda: jobs.append(post()) or len(set(jobs) - {"queue_full"}) == 2)
    assert [post() for _ in range(4)] == ["queue_full"] * 4
    server.ask("DELETE", f"/v1/videos/{jobs[-1]}", key="sk-ann")
    assert post().startswith("video_"), "the third of three"
    assert post() == "rate_limit_exceeded"


def test_posts_of_a_key_at_the_same_time_are_counted_one_after_the_other(start: Start):
    server = start(key=keys(running=1))
    post = partial(server.ask, "POST", "/v1/videos", LONG, key="sk-ann")
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(post) for _ in range(8)]
    assert sorted(one.result()[0] for one in answers) == [200] + [429] * 7


def test_limits_count_for_what_is_made_also_by_default(start: Start):
    most = {"width": 48, "height": 32, "num_frames": 9, "num_inference_steps": 2}
    server = start(limits={**most, "pixels": 48 * 32 * 9})
    server.create(BALL)
    for name, limit in most.items():
        error = server.refused("POST", "/v1/videos", {**BALL, name: limit + 16})
        assert (error["code"], error["param"]) == ("over_limit", name)
    server.stop()
    server = start(limits={"pixels": 48 * 32 * 9 - 1, "num_frames": 9})
    assert server.refused("POST", "/v1/videos", BALL)["param"] == "pixels"
    server.create({**BALL, "num_frames": 5})


def test_a_job_is_of_the_class_it_names_else_of_its_key_s_else_of_the_first(start: Start):
    server = start(
        key=keys(**{"class": "batch"}), **{"class": [{"name": "now"}, {"name": "batch"}]}
    )
    assert server.create(BALL, key="sk-ann")["slo_class"] == "batch"
    assert server.create({**BALL, "slo_class": "now"}, key="sk-ann")["slo_class"] == "now"
    assert server.create(BALL, key="sk-bob")["slo_class"] == "now"


def test_a_slow_body_does_not_hold_up_others_and_is_given_up(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(body, "_PATIENCE_S", 0.5)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        head = "POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        client.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
        assert server.ask("GET", "/healthz")[0] == 200
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_event_streams_of_a_key_are_bounded_and_a_closed_one_makes_room(start: Start):
    server = start(key=keys(), limits={"streams": 1})
    ann, bob = (server.create(LONG, key=key)["id"] for key in SECRETS.values())
    following = server.events(ann, key="sk-ann")
    next(following)
    error = server.refused("GET", f"/v1/videos/{ann}/events", key="sk-ann")
    assert (error["status"], error["code"]) == (429, "too_many_streams")
    assert int(error["headers"]["retry-after"]) >= 1
    assert server.ask("GET", f"/v1/videos/{ann}", key="sk-ann")[0] == 200
    next(server.events(bob, key="sk-bob"))
    following.close()
    wait_until(lambda: next(server.events(ann, key="sk-ann")))


def test_more_requests_at_once_than_the_server_answers_are_503(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(guard, "MAX_OPEN", 1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        head = "POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        client.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
        wait_until(lambda: server.ask("GET", "/v1/models")[0] == 503)
        status, headers, answer = server.ask("GET", "/v1/models")
        assert (status, answer["error"]["code"]) == (503, "overloaded")
        assert int(headers["retry-after"]) >= 1
        assert server.ask("GET", "/healthz")[0] == 200, "whoever asks whether it lives"
    wait_until(lambda: server.ask("GET", "/v1/models")[0] == 200)


def test_event_streams_of_all_keys_leave_room_for_other_requests(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(guard, "MAX_OPEN", 2)
    server = start(key=keys())
    ann, bob = (server.create(LONG, key=key)["id"] for key in SECRETS.values())
    following = server.events(ann, key="sk-ann")
    next(following)
    error = server.refused("GET", f"/v1/videos/{bob}/events", key="sk-bob")
    assert (error["status"], error["code"]) == (429, "too_many_streams")
    assert server.ask("DELETE", f"/v1/videos/{ann}", key="sk-ann")[0] == 200
    following.close()


def wait_until(is_so: Callable[[], object]) -> None:
    """Ask until it holds; what raises does not."""
    deadline = time.monotonic() + 30
    while True:
        with suppress(AssertionError, OSError):
            if is_so():
                return
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_more_connections_than_the_server_holds_are_closed(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    def answer(client: socket.socket) -> bytes:
        with suppress(ConnectionError):
            client.sendall(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            return client.recv(4096)
        return b""

    monkeypatch.setattr(app, "MAX_CONNECTIONS", 1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as first:
        assert answer(first).startswith(b"HTTP/1.1 200 ")
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as second:
            assert answer(second) == b""
    wait_until(lambda: server.ask("GET", "/healthz")[0] == 200)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\nGET /heal",
        b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 99\r\n\r\n",
    ],
    ids=["nothing", "half a head", "half of a second one", "no body"],
)
def test_a_connection_whose_request_dribbles_in_is_closed(
    server: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes
):
    monkeypatch.setattr(app, "HEAD_S", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as client:
        client.sendall(sent)
        deadline = time.monotonic() + 30
        while True:
            try:
                client.sendall(b"x")  # each byte would begin uvicorn's own patience anew
                if not client.recv(4096):
                    break
            except TimeoutError:
                assert time.monotonic() < deadline
            except OSError:
                break


def test_an_answer_that_takes_longer_than_the_patience_with_heads_is_whole(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "HEAD_S", 0.01)
    job = server.create({**BALL, "num_inference_steps": 20})
    assert list(server.events(job["id"]))[-1][1]["status"] == "completed"


def test_every_log_line_has_the_id_of_its_request(server: Running):
    given = {"x-request-id": "mine-1"}
    assert server.ask("GET", "/healthz", headers=given)[1]["x-request-id"] == "mine-1"
    forged = {"x-request-id": "a b" * 100}
    assert server.ask("GET", "/healthz", headers=forged)[1]["x-request-id"].startswith("req_")


def test_a_fault_of_the_server_is_told_to_its_log_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(metrics, "render", lambda *_: {}["/secret/path"])
    status, headers, answer = server.ask("GET", "/metrics")
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert headers["x-request-id"]
    assert "secret" not in str(answer)
    assert "KeyError: '/secret/path'" in caplog.text
