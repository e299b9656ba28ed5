"""The stream of micro-batches: made ahead of a GPU it is the same stream."""

from __future__ import annotations

import threading
from itertools import islice

import pytest
from fastvideo_train import batches
from fastvideo_train.batches import ahead, stream
from tiny_recipes import tiny


def counting(log, *, fails_at=-1):
    try:
        for i in range(1_000):
            log.append((i, threading.current_thread()))
            if i == fails_at:
                raise OSError(f"no batch {i}")
            yield {"ids": [i]}
    finally:
        log.append("closed")


def test_what_is_made_ahead_is_the_same_in_the_same_order():
    recipe = tiny("flow_matching")
    with stream(recipe, start=3) as plain, stream(recipe, start=3) as source:
        made = islice(ahead(source), 4)
        for one, other in zip(islice(plain, 4), made, strict=True):
            assert one["ids"] == other["ids"] and one["latents"].equal(other["latents"])


@pytest.mark.parametrize(("device", "is_ahead"), [("cpu", False), ("cpu:0", False), ("cuda", True)])
def test_a_stream_is_made_ahead_of_a_gpu_alone(device, is_ahead, monkeypatch):
    seen = []
    monkeypatch.setattr(batches, "ahead", lambda source: seen.append(source) or source)
    with stream(tiny("flow_matching", f"run.device={device}"), start=0) as made:
        next(made)
    assert bool(seen) == is_ahead


def test_one_batch_is_made_while_the_last_is_in_use_and_the_source_is_closed():
    log = []
    source = counting(log)
    made_ahead = ahead(source)
    assert next(made_ahead)["ids"] == [0]
    made_ahead.close()
    assert source.gi_frame is None, "its workers end with it"
    made = [entry[0] for entry in log if entry != "closed"]
    assert made == [0, 1] and log[-1] == "closed"
    assert threading.current_thread() not in {entry[1] for entry in log[:-1]}


def test_an_error_comes_at_its_own_batch():
    log = []
    made = ahead(counting(log, fails_at=2))
    assert [next(made)["ids"] for _ in range(2)] == [[0], [1]]
    with pytest.raises(OSError, match="no batch 2"):
        next(made)
    assert log[-1] == "closed"
