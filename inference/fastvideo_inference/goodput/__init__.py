"""Goodput: the request rate per device at which a target share of requests is in time."""
