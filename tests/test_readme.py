"""What the pages say is so: their code runs, their commands parse, their files exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fastvideo import cli, media

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()
    if (ROOT / name).is_file()
)  # fmt: skip
README = ROOT / "README.md"
CONSTRAINTS = "configs/constraints.txt"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
PACKAGE_OF = {
    "train/README.md": "train/fastvideo_train",
    "inference/README.md": "inference/fastvideo_inference",
}


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind in languages]


def commands() -> dict[str, list[str]]:
    """Return every `fastvideo ...` of the pages' shell blocks and inline code, split into words."""
    found = {}
    for page in PAGES:
        inline = re.findall(r"`([^`\n]*\bfastvideo [a-z][^`\n]*)`", BLOCK.sub("", page.read_text()))
        for line in [*"\n".join(blocks(page, "bash", "console")).splitlines(), *inline]:
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word.split("/")[-1] == "fastvideo"]
            for start in starts:
                rest = words[start + 1 :]
                end = rest.index("&&") if "&&" in rest else len(rest)
                found[f"{page.relative_to(ROOT)}: {line}"] = rest[:end]
    return found


COMMANDS = commands()


def parse(words: list[str]) -> None:
    """Parse a command line as `fastvideo` would, without running it."""
    command: Any = cli._command(words[0])
    rest = words[1:]
    if hasattr(command, "commands") and rest:
        command, rest = command.commands[rest[0]], rest[1:]
    if rest:  # a verb alone is a mention of it
        command.make_context(words[0], rest)


def test_the_python_of_the_readme_runs(tiny_folder: Path, tmp_path: Path, monkeypatch):
    (code,) = blocks(README, "python")
    assert '"fastwan-nano"' in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace('"fastwan-nano"', repr(str(tiny_folder))), "README.md", "exec"), {})
    (made,) = tmp_path.glob("*.mp4")
    assert media.read_facts(made).num_frames == 9


def test_the_first_two_shell_blocks_are_the_commands_of_the_gate():
    first, second = blocks(README, "bash")[:2]
    assert first.count("\n") == second.count("\n") == 1
    assert "pip install" in first and "fastvideo generate" in first
    assert "pip install" in second and second.rstrip().endswith("pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    assert all(f"-c {CONSTRAINTS}" in command for command in (first, second))


def test_every_package_of_both_commands_is_constrained_to_a_public_release_within_its_range():
    lines = [line for line in (ROOT / CONSTRAINTS).read_text().splitlines() if line[0] != "#"]
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}
    (exact,) = {tuple(s.operator for s in pin.specifier) for pin in pins.values()}
    assert exact == ("==",) and "+" not in "".join(lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        (pin,) = pins[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(pin.version), f"{line}: {pin.version} is constrained"


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_that_a_page_shows_parses(line: str):
    parse(COMMANDS[line])


def test_a_flag_that_does_not_exist_would_be_noticed():
    assert len(COMMANDS) > 12
    with pytest.raises(cli.UsageError):
        parse(["generate", "a red ball", "--step", "3"])


def test_files_and_scripts_of_shown_commands_exist():
    shell = "\n".join("\n".join(blocks(page, "bash", "console")) for page in PAGES)
    paths = set(re.findall(r"\b(?:configs|inference|train|demos)/\S+\.(?:toml|py)\b", shell))
    assert len(paths) >= 3
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_flags_of_shown_scripts_exist():
    shell = "\n".join("\n".join(blocks(page, "bash", "console")) for page in PAGES)
    for script, rest in re.findall(r"^\$ \S*python (\S+\.py)(.*)$", shell, re.M):
        source = (ROOT / script).read_text()
        flags = re.findall(r"\s(--[\w-]+)", rest)
        assert [flag for flag in flags if f'"{flag}"' not in source] == [], script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", BLOCK.sub("", page.read_text()))
    local = [t for t in targets if not re.match(r"[a-z]+:", t)]
    assert [t for t in local if not (page.parent / t.partition("#")[0]).exists()] == []


def test_the_reading_tour_names_eight_files():
    tour = README.read_text().partition("## Reading tour")[2].partition("\n## ")[0]
    lines = re.findall(r"^(\d)\. \[`([^`]+)`\]\(([^)]+)\) - \S", tour, re.M)
    assert [int(number) for number, _, _ in lines] == list(range(1, 9))
    for _, shown, target in lines:
        assert shown == target
        assert (ROOT / target).is_file()


def table_of(page: Path) -> list[str]:
    """Return the names in the first column of a page's table of files."""
    rows = re.findall(r"^\| (`[^|]+) \|", page.read_text(), re.M)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("page", PACKAGE_OF)
def test_the_table_of_a_folder_names_files_that_exist_and_forgets_none(page: str):
    package = ROOT / PACKAGE_OF[page]
    patterns = [re.sub(r"<\w+>", "*", name) for name in table_of(ROOT / page)]
    assert [name for name in patterns if not list(package.glob(name.rstrip("/")))] == []
    modules = [p.name for p in package.glob("*.py") if not p.name.startswith("_")]
    assert [name for name in modules if name not in patterns] == []


def test_the_table_of_the_readme_names_every_top_folder():
    rows = re.findall(r"^\| \[?`(\w+)/`", README.read_text(), re.M)
    folders = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith((".", "__")) and any(path.rglob("*.*"))
    }
    made = {"outputs", "runs", "build", "dist", "eval"}  # by commands, not kept in git
    assert set(rows) == {name for name in folders - made if not name.endswith(".egg-info")}
