"""Where batches come from: clips rendered as they are needed, or latents stored once."""

Part = tuple[int, int]
"""Which of how many equal parts of every batch is one process's own."""
WHOLE: Part = (0, 1)


def items(batch: int, part: Part) -> range:
    """Return the places in a batch of `batch` clips that are a part's own."""
    place, count = part
    assert batch % count == 0, f"a batch of {batch} was not checked to have {count} equal parts"
    size = batch // count
    return range(place * size, (place + 1) * size)
