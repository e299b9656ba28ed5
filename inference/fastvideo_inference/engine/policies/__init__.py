"""Which job is next: a file each, with `order(waiting, running, deadlines_s)` and `PREEMPTS`.

If that is true, `preempts(waiting, running, deadlines_s)` says whose workers are asked back.
"""
