"""Print requirements of pyproject.toml as lines for pip: for `.ci/versions` alone.

--all               core and dev
--lowest PIN...     the lower end of each core range; a PIN stands in place of its own
--pins REPORT PIN...  what the package in a report of pip's pins exactly, and each PIN
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def main(mode: str, *rest: str) -> None:
    """Print the lines of one mode."""
    if mode == "--all":
        lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    elif mode == "--lowest":
        own = {re.split("[<>=]", pin)[0] for pin in rest}
        ranges = [re.match(r"([\w-]+)>=([\d.]+)", line) for line in PROJECT["dependencies"]]
        lines = [*rest, *(f"{r[1]}=={r[2]}" for r in ranges if r and r[1] not in own)]
    else:
        report, *pins = rest
        (found,) = json.loads(Path(report).read_text())["install"]
        asked = found["metadata"]["requires_dist"]
        exact = [line.split(";")[0] for line in asked if re.match(r"[\w-]+==", line)]
        lines = [*pins, *(line.strip() for line in exact if "[" not in line)]
    sys.stdout.write("\n".join(lines) + "\n")


main(*sys.argv[1:])
