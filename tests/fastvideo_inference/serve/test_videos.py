"""The Videos API: what a client sends, and what it is answered."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastvideo_inference.engine.engine import Engine
from fastvideo_inference.pipeline import VideoPipeline
from fastvideo_inference.recipe import read_recipe
from fastvideo_inference.serve import app, body, videos
from fastvideo_inference.serve.guard import RequestIdFilter
from tiny_loras import pairs, write, write_as

from fastvideo import media, sampling
from fastvideo.cli import main
from fastvideo.model import load
from fastvideo.sampling import GenerateRequest
from tests.serving import BALL, LONG, Running, Start

NEVER_NULL = (
    "id",
    "object",
    "created_at",
    "status",
    "progress",
    "prompt",
    "model",
    "seconds",
    "size",
)


def test_a_clip_is_what_the_pipeline_makes_of_the_same_request(
    server: Running, tiny_folder: Path, tmp_path: Path
):
    job = server.finished({**BALL, "size": "32x48"})
    clip = VideoPipeline.from_pretrained(tiny_folder)(**BALL, width=32, height=48)
    assert job["frames_sha256"] == clip.frames_sha256
    assert job["recipe"]["request"] == clip.recipe["request"]
    assert job["recipe"]["model"]["fingerprint"] == clip.recipe["model"]["fingerprint"]
    status, headers, data = server.ask("GET", f"/v1/videos/{job['id']}/content")
    assert (status, headers.get_content_type()) == (200, "video/mp4")
    (tmp_path / "clip.mp4").write_bytes(data)
    assert read_recipe(tmp_path / "clip.mp4").model_dump(mode="json") == job["recipe"]
    assert set(job["stage_seconds"]) >= {"encode_text", "denoise", "decode"}
    assert job["inference_time_s"] == pytest.approx(sum(job["stage_seconds"].values()))
    assert job["accepted_at_s"] <= job["finished_at_s"]
    assert job["created_at"] == int(job["accepted_at_s"])
    assert job["expires_at"] > job["completed_at"]


def test_fields_that_openai_never_leaves_null_are_never_null(server: Running):
    job = server.create(BALL)
    seen = [job, *(values for kind, values in server.events(job["id"]) if kind == "status")]
    assert [one["status"] for one in seen][-1] == "completed"
    for one in seen:
        assert all(one[name] is not None for name in NEVER_NULL)
        assert isinstance(one["seconds"], str)
        assert one["model"] == "tiny"


def test_a_form_of_texts_and_json_ask_for_the_same(server: Running):
    form = {"prompt": "a red ball", "size": "48x32", "seconds": "1", "seed": "7", "steps": "1"}
    lines = [
        f'--b\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in form.items()
    ]
    kind = {"content-type": "multipart/form-data; boundary=b"}
    text = "".join(lines) + "--b--\r\n"
    status, _, first = server.ask("POST", "/v1/videos", body=text.encode(), headers=kind)
    assert status == 200, first
    second = server.create({**form, "seconds": 1, "seed": 7, "steps": 1})
    fields = {*sampling.settings(sampling.HTTP), "size", "seconds"}
    made = [{name: job[name] for name in fields & job.keys()} for job in (first, second)]
    assert made[0] == made[1] != {}
    assert made[0]["num_frames"] == 9, "the smallest 4k+1 of at least 8 frames"
    assert made[0]["seconds"] == "1.125", "what is made"


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"),
    [("5", 16, 81), ("5", 15.9375, 81), ("0.01", 8, 1), ("1", 30000 / 1001, 33)],
)
def test_seconds_are_the_smallest_legal_number_of_frames_that_lasts_as_long(seconds, fps, frames):
    assert body.frames_of(seconds, fps=fps, stride=4) == frames


def test_a_lora_is_used_by_its_name_in_the_config(start: Start, tiny_folder: Path, tmp_path: Path):
    net = load(tiny_folder, dtype="float32", parts=("dit",)).dit
    file = write_as("comfy", tmp_path, pairs(net))
    server = start(lora={"style": str(file)})
    made = server.finished({**BALL, "lora": ["style:0.5"]})
    clip = VideoPipeline.from_pretrained(tiny_folder)(**BALL, lora=[f"{file}:0.5"])
    assert made["frames_sha256"] == clip.frames_sha256 != server.finished(BALL)["frames_sha256"]
    assert server.refused("POST", "/v1/videos", {**BALL, "lora": str(file)})["param"] == "lora"
    (own,), (there,) = clip.recipe["request"]["lora"], made["recipe"]["request"]["lora"]
    assert there == {**own, "path": "style"}


def test_nothing_that_a_client_gets_names_a_folder_of_the_server(
    start: Start, tiny_folder: Path, tmp_path: Path
):
    style = write_as("peft", tmp_path, pairs(load(tiny_folder, parts=("dit",)).dit))
    config = style.with_name("adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "soft_cap": 3}))
    no_lora = write(tmp_path / "none.safetensors", {"x": torch.zeros(1)})
    files = {"style": style, "none": no_lora, "gone": tmp_path / "gone.safetensors"}
    server = start(lora={name: str(file) for name, file in files.items()})
    made = server.finished({**BALL, "lora": "style"})
    assert made["recipe"]["model"]["name_or_path"] == "tiny"
    assert "style: soft_cap = 3" in made["recipe"]["unknown_keys"]
    *_, (_, failed) = server.events(server.create({**BALL, "lora": "none"})["id"])
    assert failed["error"]["message"].startswith("none: ")
    refused = server.refused("POST", "/v1/videos", {**BALL, "lora": "gone"})
    assert "LoRA 'gone'" in refused["message"]
    content = server.ask("GET", f"/v1/videos/{made['id']}/content")[2]
    for got in map(str, (made, failed, refused["message"], content)):
        assert str(tmp_path) not in got
        assert str(tiny_folder.parent) not in got


def test_a_small_decoder_is_used_by_its_name_in_the_config_and_is_that_of_a_repeated_clip(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    worker = {"model": "fastwan-nano", "devices": ["cpu"]}
    server = start(worker=[worker], decoder={"small": "tiny"})
    asked = {"prompt": "a red ball", "seed": 1, "num_frames": 5, "width": 32, "height": 32}
    made = server.finished({**asked, "decoder": "small"})
    clip = VideoPipeline.from_pretrained("fastwan-nano", decoder="tiny")(**asked)
    assert made["frames_sha256"] == clip.frames_sha256
    assert made["recipe"]["decoder"] == {**clip.recipe["decoder"], "name_or_path": "small"}
    assert server.refused("POST", "/v1/videos", {**asked, "decoder": "tiny"})["param"] == "decoder"
    old = {**made["recipe"], "decoder": {**made["recipe"]["decoder"], "fingerprint": "0" * 64}}
    replace(clip, recipe=old).save(tmp_path / "old.mp4")
    again = [f"--from={tmp_path}/old.mp4", f"--server={server.url}", f"--output={tmp_path}/new.mp4"]
    assert main(["generate", *again]) == 1
    assert "another decoder small than the one that is there" in capsys.readouterr().err


def test_a_number_of_frames_beside_seconds_wins(server: Running):
    assert server.create({**BALL, "seconds": 5, "num_frames": 5})["num_frames"] == 5


def test_what_a_body_may_say_is_the_declaration():
    declared = set(sampling.settings(sampling.HTTP))
    assert set(body.schema(["tiny"])["properties"]) == {
        *declared,
        *body.Beside.model_fields,
        "size",
    }
    assert set(GenerateRequest.model_fields) - declared == body.REFUSED.keys() - {"input_reference"}


def test_a_job_streams_its_progress_and_ends(server: Running):
    job = server.create({**BALL, "num_inference_steps": 3, "previews": True})
    events = list(server.events(job["id"]))
    kinds = [kind for kind, _ in events]
    assert (kinds[0], kinds[-1]) == ("status", "status")
    assert events[-1][1]["status"] == "completed"
    steps = [v["index"] for kind, v in events if kind == "progress" and v["stage"] == "denoise"]
    assert steps == sorted(steps)
    assert steps[-1] == 3
    for kind, values in events:
        if kind == "preview":
            assert base64.b64decode(values["png"]).startswith(b"\x89PNG")
    assert list(server.events(job["id"]))[-1][1]["status"] == "completed", "also afterwards"


def test_a_silent_stream_says_that_it_is_alive(server: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(videos, "_PING_S", 1e-4)
    job = server.create(LONG)
    with urllib.request.urlopen(f"{server.url}/v1/videos/{job['id']}/events", timeout=60) as lines:
        assert any(line == b": alive\n" for line in lines)
    server.ask("DELETE", f"/v1/videos/{job['id']}")


def test_the_thumbnail_is_the_first_frame(server: Running, tmp_path: Path):
    job = server.finished(BALL)
    content = f"/v1/videos/{job['id']}/content"
    status, headers, image = server.ask("GET", f"{content}?variant=thumbnail")
    assert (status, headers.get_content_type()) == (200, "image/webp")
    (tmp_path / "clip.mp4").write_bytes(server.ask("GET", content)[2])
    assert image == media.thumbnail(tmp_path / "clip.mp4")
    assert server.refused("GET", f"{content}?variant=spritesheet")["param"] == "variant"


def test_a_range_of_the_content_is_sent_and_one_that_it_has_not_is_416(server: Running):
    path = f"/v1/videos/{server.finished(BALL)['id']}/content"
    whole = server.ask("GET", path)[2]
    status, headers, part = server.ask("GET", path, headers={"range": "bytes=4-7"})
    assert (status, part) == (206, b"ftyp")
    assert headers["content-range"] == f"bytes 4-7/{len(whole)}"
    for wrong in (f"bytes={len(whole)}-", "bytes=7-4", "bytes=", "lines=1-2", "bytes"):
        error = server.refused("GET", path, headers={"range": wrong})
        assert error["status"] == 416
        assert error["headers"]["content-range"] == f"bytes */{len(whole)}"


def test_jobs_are_listed_page_by_page_in_either_order(server: Running):
    made = [server.finished({**BALL, "seed": seed})["id"] for seed in range(3)]
    _, _, page = server.ask("GET", "/v1/videos?limit=2")
    assert [job["id"] for job in page["data"]] == made[:0:-1]
    assert (page["object"], page["has_more"]) == ("list", True)
    _, _, after = server.ask("GET", f"/v1/videos?limit=1&after={page['last_id']}")
    assert after["first_id"] == made[0]
    _, _, oldest = server.ask("GET", "/v1/videos?order=asc&limit=100")
    assert [job["id"] for job in oldest["data"]][-3:] == made
    assert server.refused("GET", "/v1/videos?limit=0")["param"] == "limit"
    assert server.refused("GET", "/v1/videos?after=video_x")["status"] == 404


def test_a_deleted_job_stops_and_is_not_found_and_leaves_no_file(server: Running):
    job = server.create(LONG)
    following = server.events(job["id"])
    next(
        values for kind, values in following if kind == "progress" and values["stage"] == "denoise"
    )
    status, _, answer = server.ask("DELETE", f"/v1/videos/{job['id']}")
    assert (status, answer) == (200, {"id": job["id"], "object": "video.deleted", "deleted": True})
    assert server.refused("GET", f"/v1/videos/{job['id']}")["status"] == 404
    assert not [values for _, values in following if values.get("status") == "completed"]
    done = server.finished(BALL)
    server.ask("DELETE", f"/v1/videos/{done['id']}")
    assert server.refused("GET", f"/v1/videos/{done['id']}/content")["status"] == 404
    assert not [file for file in server.folder.rglob("*") if done["id"] in file.name]


def test_requests_that_delete_one_job_at_once_are_all_answered(server: Running):
    job = server.create(LONG)
    with ThreadPoolExecutor(16) as threads:
        asked = [("DELETE", ""), ("GET", ""), ("GET", "/events"), ("GET", "/content")] * 8
        paths = [(method, f"/v1/videos/{job['id']}{rest}") for method, rest in asked]
        answers = list(threads.map(lambda one: server.ask(*one)[0], paths))
    assert set(answers) <= {200, 404, 409}
    assert server.refused("GET", f"/v1/videos/{job['id']}")["status"] == 404


def test_content_that_is_not_there_yet_is_a_conflict(server: Running):
    job = server.create(LONG)
    assert server.refused("GET", f"/v1/videos/{job['id']}/content")["code"] == "video_not_ready"
    server.ask("DELETE", f"/v1/videos/{job['id']}")


def test_content_whose_file_goes_just_before_its_job_is_not_found(server: Running):
    job = server.finished(BALL)
    (server.folder / f"{job['id']}.mp4").unlink()
    for variant in ("video", "thumbnail"):
        content = f"/v1/videos/{job['id']}/content?variant={variant}"
        assert server.refused("GET", content)["status"] == 404


def test_a_repeated_request_with_one_key_is_one_job_and_another_body_a_conflict(server: Running):
    key = {"idempotency-key": "once"}
    first, again = (server.create(BALL, headers=key) for _ in range(2))
    assert first["id"] == again["id"]
    other = {**BALL, "seed": 2}
    assert server.refused("POST", "/v1/videos", other, headers=key)["status"] == 409


def test_a_repeated_request_whose_clip_was_removed_is_a_conflict_and_makes_no_second_one(
    server: Running,
):
    key = {"idempotency-key": "gone"}
    first = server.create(BALL, headers=key)
    server.ask("DELETE", f"/v1/videos/{first['id']}")
    error = server.refused("POST", "/v1/videos", BALL, headers=key)
    assert (error["status"], error["code"]) == (409, "idempotency_conflict")


def test_several_clips_of_one_request_are_jobs_that_name_each_other(server: Running):
    first = server.create({**BALL, "seed": 5, "count": 3}, headers={"idempotency-key": "three"})
    again = server.create({**BALL, "seed": 5, "count": 3}, headers={"idempotency-key": "three"})
    assert again["clips"] == first["clips"]
    assert first["clips"][0] == first["id"]
    jobs = [server.ask("GET", f"/v1/videos/{one}")[2] for one in first["clips"]]
    assert [job["seed"] for job in jobs] == [5, 6, 7]
    assert all(job["clips"] == first["clips"] for job in jobs)
    for wrong in (0, 17, "many"):
        assert server.refused("POST", "/v1/videos", {**BALL, "count": wrong})["param"] == "count"


def test_a_full_queue_is_429_with_the_seconds_to_wait(start: Start):
    server = start(**{"class": [{"name": "only", "queue": 1}]})
    jobs = [server.create(LONG)]
    deadline = time.monotonic() + 30
    while server.ask("GET", f"/v1/videos/{jobs[0]['id']}")[2]["status"] == "queued":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(8):  # the stages before the busy one may take some
        status, headers, answer = server.ask("POST", "/v1/videos", LONG)
        if status != 200:
            break
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    assert int(headers["retry-after"]) >= 1


@pytest.mark.parametrize("limits", [{"output_ttl_s": 0.5}, {"output_bytes": 1}])
def test_files_that_are_too_old_or_too_much_are_removed_with_their_jobs(
    start: Start, limits: dict[str, float], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "_CLEANING_S", 0.25)
    server = start(limits=limits)
    job = server.create(BALL)
    deadline = time.monotonic() + 30
    is_there = True
    while is_there or list(server.folder.rglob("*.mp4")):  # the file goes after the job
        assert time.monotonic() < deadline
        time.sleep(0.05)
        is_there = server.ask("GET", f"/v1/videos/{job['id']}")[0] != 404
    assert b"completed_total 1" in server.ask("GET", "/metrics")[2]


def test_the_oldest_files_go_first(start: Start, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "_CLEANING_S", 0.1)
    first = start()
    jobs = [first.finished({**BALL, "seed": seed})["id"] for seed in range(3)]
    sizes = [(first.folder / f"{job}.mp4").stat().st_size for job in jobs]
    first.stop()
    again = start(limits={"output_bytes": sum(sizes[1:])})
    deadline = time.monotonic() + 30
    while len(kept := [job["id"] for job in again.ask("GET", "/v1/videos")[2]["data"]]) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert kept == jobs[:0:-1]


def test_the_thumbnail_of_a_damaged_file_is_a_conflict(server: Running):
    job = server.finished(BALL)
    (server.folder / f"{job['id']}.mp4").write_bytes(b"x" * 100)
    error = server.refused("GET", f"/v1/videos/{job['id']}/content?variant=thumbnail")
    assert (error["status"], error["code"]) == (409, "video_damaged")


def test_a_job_ends_also_if_its_client_has_gone(server: Running):
    job = server.create(BALL)
    following = server.events(job["id"])
    next(following)
    following.close()
    assert list(server.events(job["id"]))[-1][1]["status"] == "completed"


def test_a_server_that_is_started_again_knows_its_jobs_and_has_their_files(start: Start):
    first = start()
    job = first.finished(BALL)
    content = first.ask("GET", f"/v1/videos/{job['id']}/content")[2]
    first.stop()
    again = start()
    assert again.ask("GET", f"/v1/videos/{job['id']}")[2] == job
    assert again.ask("GET", f"/v1/videos/{job['id']}/content")[2] == content
    assert again.ask("GET", "/v1/videos")[2]["data"] == [job]


def test_a_server_that_ends_takes_no_more_jobs_and_still_answers(start: Start):
    server = start()
    assert [server.ask("GET", path)[0] for path in ("/readyz", "/healthz")] == [200, 200]
    job = server.create(LONG)
    next(server.events(job["id"]))
    server.signal()
    deadline = time.monotonic() + 30
    while server.ask("GET", "/readyz")[0] == 200:
        assert time.monotonic() < deadline
    status, headers, answer = server.ask("POST", "/v1/videos", BALL)
    assert (status, answer["error"]["code"]) == (503, "draining")
    assert int(headers["retry-after"]) >= 1
    assert server.ask("GET", f"/v1/videos/{job['id']}")[0] == 200


def test_delete_is_503_once_the_engine_has_stopped(start: Start, monkeypatch: pytest.MonkeyPatch):
    engines = []
    monkeypatch.setattr(app, "Engine", lambda config: engines.append(Engine(config)) or engines[0])
    server = start()
    jobs = server.finished(BALL), server.create(LONG)
    asyncio.run_coroutine_threadsafe(engines[0].stop(), server.loop).result()
    for job in jobs:
        status, headers, answer = server.ask("DELETE", f"/v1/videos/{job['id']}")
        assert (status, answer["error"]["code"]) == (503, "draining")
        assert int(headers["retry-after"]) >= 1


def test_a_line_of_a_worker_has_the_id_of_its_job(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    no_lora = write(tmp_path / "none.safetensors", {"x": torch.zeros(1)})
    server = start(lora={"none": str(no_lora)})
    with caplog.filtering(RequestIdFilter()):
        job = server.create({**BALL, "lora": "none"})
        assert list(server.events(job["id"]))[-1][1]["status"] == "failed"
    ids = {record.request_id for record in caplog.records if job["id"] in record.getMessage()}
    assert ids == {job["id"], *(one for one in ids if one.startswith("req_"))}
