"""Old home of the row of stages; see `moved`."""

from fastvideo_inference.moved import Names

__getattr__ = Names(__name__)
