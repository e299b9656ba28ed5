"""Where workers run: a file each, with an `Executor` whose `start` returns a `Handle`."""
