"""`python -m fastvideo` is the `fastvideo` command."""

import sys

from fastvideo.cli import main

if __name__ == "__main__":
    sys.exit(main())
