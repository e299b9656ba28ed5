"""The front door: lazy verbs, one-line errors, exit codes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType

import pytest

from fastvideo import cli, errors


def in_fresh_python(*calls: list[str]) -> list[str]:
    """Run `main` on lists of words in one interpreter; return its exit codes and modules."""
    script = (
        "import sys, contextlib, io\n"
        "from fastvideo.cli import main\n"
        f"for words in {calls!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), "
        "contextlib.redirect_stderr(io.StringIO()) as err:\n"
        "        code = main(words)\n"
        "    print('code', code, len(err.getvalue().splitlines()), err.getvalue().strip())\n"
        "print('modules', *sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_help_and_version_import_nothing_but_typer():
    *codes, modules = in_fresh_python(["--help"], ["--version"], [])
    assert all(line.startswith("code 0 0") for line in codes)
    heavy = {"torch", "numpy", "pydantic", "rich.console", "fastvideo_inference", "fastvideo_train"}
    assert not heavy & set(modules.split())


def test_wrong_arguments_of_every_verb_are_refused_in_one_line_without_torch():
    calls = [[verb, "--no-such-option"] for verb in cli.VERBS]
    calls += [["inspect"], ["train"], ["genrate"], ["--no-such-option"]]
    *codes, modules = in_fresh_python(*calls)
    for words, line in zip(calls, codes, strict=True):
        assert line.startswith("code 2 1 error: "), (words, line)
    assert "torch" not in modules.split()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_help_text(verb: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([verb, "--help"]) == errors.OK
    assert f"Usage: fastvideo {verb}" in capsys.readouterr().out


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == errors.OK
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)


def test_a_flag_that_is_given_twice_is_told_by_every_verb(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", "stats", "nowhere", "--fps", "8", "--set", "a=1", "--fps=9"]) == 2
    assert cli.main(["inspect", "nowhere", "--json", "--json"]) != 0
    told = [line for line in capsys.readouterr().err.splitlines() if "twice" in line]
    assert [line[line.index("--") :] for line in told] == [
        "--fps is given twice: the last one counts",
        "--json is given twice: the last one counts",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "wan-nano", "--seed", "1.0"],
        ["eval", "wan-nano", "--prompts", "8.0"],
        ["generate", "x", "--steps", "2.0"],
        ["generate", "x", "--count=1e1"],
        ["train", "x.toml", "--threads", "2.0"],
        ["data", "encode", "-o", "x", "--model", "y", "--clips", "4.0"],
        ["demo", "--port", "7860.0"],
    ],
)
def test_whole_numbers_of_every_verb_have_no_point(words: list[str], capsys):
    assert cli.main(words) == errors.USAGE
    err = capsys.readouterr().err
    assert words[-1].rpartition("=")[2] in err or "integer" in err
    assert err.count("\n") == 1 and "Invalid value for '--" in err


def test_a_mistyped_verb_gets_a_suggestion(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["genrate"]) == errors.USAGE
    assert "did you mean 'generate'?" in capsys.readouterr().err


def test_a_verb_that_works_alone_refuses_a_launcher(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["eval", "wan-nano"]) == errors.USAGE
    assert "eval works in one process; start it without a launcher" in capsys.readouterr().err


def test_shell_completion_knows_verbs_and_their_options():
    def complete(words: str, place: int) -> str:
        env = {
            "_FASTVIDEO_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(place),
        }
        code = f"import os; os.environ.update({env!r}); from fastvideo.cli import main; main()"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout

    assert complete("fastvideo gen", 1).split() == ["generate"]
    assert complete("fastvideo generate --gui", 2).split() == ["--guidance"]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch):
    """Put a verb in place that raises what it is given."""

    def install(error: BaseException) -> None:
        def verb() -> None:
            raise error

        module = ModuleType("broken_verb")
        module.__dict__["verb"] = verb
        monkeypatch.setitem(sys.modules, "broken_verb", module)
        monkeypatch.setitem(cli.VERBS, "broken", ("broken_verb:verb", "Break."))

    return install


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("this\nthat"), 1, "error: this that"),
        (
            OSError(28, "No space left on device", "a.mp4"),
            1,
            "error: a.mp4: No space left on device",
        ),
        (KeyError("x"), 1, "error: KeyError: 'x' (FASTVIDEO_LOG=debug shows where)"),
        (errors.RefusedError("no"), 2, "error: no"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_each_kind_of_failure_has_its_code_and_one_line(
    broken, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str
):
    broken(error)
    assert cli.main(["broken"]) == code
    assert capsys.readouterr().err == text + "\n"


def test_debug_level_shows_the_traceback(broken, monkeypatch: pytest.MonkeyPatch):
    broken(ValueError("deep"))
    monkeypatch.setenv("FASTVIDEO_LOG", "debug")
    with pytest.raises(ValueError, match="deep"):
        cli.main(["broken"])


def test_an_unknown_log_level_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("FASTVIDEO_LOG", "loud")
    assert cli.main(["--version"]) == errors.FAILED
    assert "log level 'loud'" in capsys.readouterr().err


def test_the_module_runs_as_a_program():
    run = subprocess.run(
        [sys.executable, "-m", "fastvideo", "--version"], capture_output=True, text=True
    )
    version = importlib.import_module("fastvideo").__version__
    assert (run.returncode, run.stdout) == (0, f"fastvideo {version}\n")
