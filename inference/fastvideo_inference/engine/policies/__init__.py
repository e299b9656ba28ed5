"""Which job is next: a file each, with `order(waiting, running, deadlines_s)` and `preempts`."""
