"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(stats: Mapping[str, Any], rejected: Counter[str]) -> str:
    """Return the engine's `stats` and the refused creations, by reason, as text."""
    states = Counter(str(worker["state"]) for worker in stats["workers"])
    lines = [
        *_metric("queue_jobs", "gauge", "Jobs that wait", stats["queued"], "slo_class"),
        *_metric("running_jobs", "gauge", "Jobs that are made", stats["running"]),
        *_metric("workers", "gauge", "Workers by state", states, "state"),
        *_metric("admitted_total", "counter", "Jobs accepted", stats["admitted"]),
        *_metric("rejected_total", "counter", "Creations refused", rejected, "reason"),
        *_metric("completed_total", "counter", "Jobs completed", stats["completed"]),
        *_metric("cancelled_total", "counter", "Jobs cancelled", stats["cancelled"]),
        *_metric("failed_total", "counter", "Jobs failed", stats["failed"], "reason"),
        *_metric("worker_deaths_total", "counter", "Workers that died", stats["worker_deaths"]),
        *_metric(
            "transfer_bytes_total", "counter", "States between processes", stats["transfer_bytes"]
        ),
        *_metric(
            "queue_seconds", "summary", "From acceptance to the first stage", stats["queue_s"]
        ),
        *_metric("stage_seconds", "summary", "Work of a stage", stats["stage_s"], "stage"),
        *_metric("transfer_seconds", "summary", "States between processes", stats["transfer_s"]),
    ]
    return "\n".join(lines) + "\n"


def _metric(name: str, type_: str, text: str, values: Any, label: str = "") -> Iterator[str]:
    """Yield the lines of a metric, of each label if there are; a summary's are [count, sum]."""
    yield f"# HELP fastvideo_{name} {text}."
    yield f"# TYPE fastvideo_{name} {type_}"
    suffixes = ("_count", "_sum") if type_ == "summary" else ("",)
    for key, value in sorted(values.items()) if label else [("", values)]:
        shown = f"{{{label}={json.dumps(key, ensure_ascii=False)}}}" if label else ""
        for suffix, number in zip(suffixes, value if type_ == "summary" else [value], strict=True):
            yield f"fastvideo_{name}{suffix}{shown} {number}"
