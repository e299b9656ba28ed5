"""What a folder of videos holds, in numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from fastvideo_train.data.folder import Found
from fastvideo_train.data.plan import Plan


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the least, middle and largest of some numbers."""
    return {"min": min(values), "median": median(values), "max": max(values)}


def summary(found: Found, plan: Plan, *, num_tokens: Sequence[int] | None = None) -> dict[str, Any]:
    """Return counts, and what the clips of a plan are like; plain values, for JSON.

    num_tokens: of each clip's caption, if a tokenizer counted them.
    """
    clips, rules = plan.clips, plan.rules
    reasons = Counter(re.split("[:;]", one.reason)[0] for one in (*plan.bad, *plan.unfit))
    values: dict[str, Any] = {
        "videos": len(clips) + len(plan.bad) + len(plan.unfit),
        "usable": len(clips),
        "bad": len(plan.bad),
        "left_out": len(plan.unfit),
        "reasons": dict(reasons.most_common()),
        "other_files": dict(found.others),
        "lone_captions": len(found.lone),
    }
    if not clips:
        return values
    facts = [clip.footage for clip in clips]
    words = [len(clip.video.caption.split()) for clip in clips]
    values |= {
        "duration_s": spread([f.duration_s for f in facts]),
        "total_s": sum(f.duration_s for f in facts),
        "used_s": sum(clip.fit.bucket.frames for clip in clips) / rules.fps,
        "sizes": dict(Counter(f"{f.width}x{f.height}" for f in facts).most_common()),
        "codecs": dict(Counter(f.codec for f in facts).most_common()),
        "fps": spread([f.fps for f in facts]),
        "variable_rate": sum(f.is_variable for f in facts),
        "turned": sum(f.is_turned for f in facts),
        "alpha": sum(f.has_alpha for f in facts),
        "audio": sum(f.has_audio for f in facts),
        "captions": len({clip.video.caption for clip in clips}),
        "caption_words": spread(words),
        "buckets": {
            bucket.name: {
                "clips": count,
                "kept": fmean(clip.fit.kept for clip in plan.of(bucket.name)),
            }
            for bucket, count in plan.buckets().items()
        },
        "distinct_batch": min(plan.buckets().values()),
    }
    if num_tokens is not None:
        values["caption_tokens"] = spread(num_tokens)
    return values
