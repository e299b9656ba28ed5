"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_Sample = tuple[Mapping[str, str], float]


def render(stats: Mapping[str, Any], rejected: Counter[str]) -> str:
    """Return the engine's `stats` and the refused creations, by reason, as text."""

    def by(label: str, values: Mapping[str, float]) -> list[_Sample]:
        return [({label: key}, value) for key, value in sorted(values.items())]

    states = Counter(str(worker["state"]) for worker in stats["workers"])
    deaths, moved = stats["worker_deaths"], stats["transfer_bytes"]
    lines = [
        *_metric("queue_jobs", "gauge", "Jobs that wait", by("slo_class", stats["queued"])),
        *_metric("running_jobs", "gauge", "Jobs that are made", [({}, stats["running"])]),
        *_metric("workers", "gauge", "Workers by state", by("state", states)),
        *_metric("admitted_total", "counter", "Jobs accepted", [({}, stats["admitted"])]),
        *_metric("rejected_total", "counter", "Creations refused", by("reason", rejected)),
        *_metric("completed_total", "counter", "Jobs completed", [({}, stats["completed"])]),
        *_metric("cancelled_total", "counter", "Jobs cancelled", [({}, stats["cancelled"])]),
        *_metric("failed_total", "counter", "Jobs failed", by("reason", stats["failed"])),
        *_metric("worker_deaths_total", "counter", "Workers that died", [({}, deaths)]),
        *_metric("transfer_bytes_total", "counter", "States between processes", [({}, moved)]),
        *_summary("queue_seconds", "From acceptance to the first stage", {"": stats["queue_s"]}),
        *_summary("stage_seconds", "Work of a stage", stats["stage_s"], label="stage"),
        *_summary("transfer_seconds", "States between processes", {"": stats["transfer_s"]}),
    ]
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> Iterator[str]:
    yield f"# HELP fastvideo_{name} {text}."
    yield f"# TYPE fastvideo_{name} {kind}"
    for labels, value in samples:
        yield f"fastvideo_{name}{_labels(labels)} {value}"


def _summary(
    name: str, text: str, values: Mapping[str, tuple[int, float]], *, label: str = ""
) -> Iterator[str]:
    yield f"# HELP fastvideo_{name} {text}."
    yield f"# TYPE fastvideo_{name} summary"
    for key, (count, total_s) in sorted(values.items()):
        labels = _labels({label: key} if label else {})
        yield f"fastvideo_{name}_count{labels} {count}"
        yield f"fastvideo_{name}_sum{labels} {total_s}"


def _labels(labels: Mapping[str, str]) -> str:
    quoted = [
        '{}="{}"'.format(key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))
        for key, value in labels.items()
    ]
    return "{" + ",".join(quoted) + "}" if quoted else ""
