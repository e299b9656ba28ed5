"""The front door: a verb is a string until it is typed, and only that verb's module is imported."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fastvideo import __version__, env, log, termination
from fastvideo.errors import (
    FAILED,
    INTERRUPTED,
    OK,
    TERMINATED,
    USAGE,
    RefusedError,
    Terminated,
    one_line,
)
from fastvideo.registry import did_you_mean

# verb: (where its function is, what it does)
VERBS = {
    "generate": (
        "fastvideo_inference.commands.generate:generate",
        "Make clips from prompts.",
    ),
    "inspect": (
        "fastvideo_inference.commands.inspect:inspect",
        "Tell what a clip or a model folder is made of.",
    ),
    "doctor": (
        "fastvideo_inference.commands.doctor:doctor",
        "Check this machine: devices, attention backends, codecs, disk.",
    ),
    "data": ("fastvideo_train.commands.data:data", "Check, preview and encode training data."),
    "train": ("fastvideo_train.commands.train:train", "Train a model from a recipe (TOML)."),
    "export": ("fastvideo_train.commands.export:export", "Turn a run into a model folder."),
    "lora": ("fastvideo_inference.commands.lora:lora", "Merge LoRAs into a model folder."),
    "eval": (
        "fastvideo_inference.commands.eval:evaluate",
        "Measure how faithfully a model follows its prompts.",
    ),
    "serve": (
        "fastvideo_inference.commands.serve:serve",
        "Serve models over HTTP: OpenAI's Videos API.",
    ),
    "profile": (
        "fastvideo_inference.commands.profile:profile",
        "Measure the seconds of each stage on this machine.",
    ),
    "plan": (
        "fastvideo_inference.commands.plan:plan",
        "Find which workers give the most goodput.",
    ),
    "bench": (
        "fastvideo_inference.commands.bench:bench",
        "Measure the goodput of a server under load.",
    ),
    "demo": ("fastvideo_inference.commands.demo:demo", "Open the demo page in a browser."),
}
IN_MANY = ("generate", "train")
"""Verbs that may run in several processes of a launcher at once."""
_FIRST_SPEAKS_S = 5.0

# Typer's own base of all usage errors, whichever click it was built on.
UsageError: type[Any] = typer.BadParameter.__mro__[1]


class Verb(TyperCommand):
    """A command that reads whole numbers strictly and warns of flags that are given twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words; list repeated flags, of which the last counts, in `ctx.meta`."""
        words, _, order = self.make_parser(ctx).parse_args(args=list(args))
        twice = (one.opts[0] for one in order if not one.multiple)
        ctx.meta["given_twice"] = log.warned(log.given_twice(twice))
        rest = list(super().parse_args(ctx, args))
        from fastvideo.sampling import typed_whole  # late: --help, which ends above, does without

        for one in order:
            word: Any = words.get(one.name)
            # some releases of Typer read 1.0 as a whole number
            is_whole = type(ctx.params.get(one.name)) is int and isinstance(word, str)
            if is_whole and isinstance(typed_whole(word), str):
                ctx.fail(f"Invalid value for '{one.opts[0]}': {word!r} must be a whole number")
        return rest


class Verbs(TyperGroup):
    """A command group that imports the module of a verb when that verb is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the verbs in the order in which one needs them."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import one verb; None if there is no such verb."""
        return _command(cmd_name) if cmd_name in VERBS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb that `args` begin with, or fail with the nearest one."""
        if args[0] not in VERBS and not args[0].startswith("-"):
            known = ", ".join(VERBS)
            ctx.fail(f"verb {args[0]!r} is unknown{did_you_mean(args[0], VERBS)} (known: {known})")
        if env.world_size() > 1 and args[0] in VERBS and args[0] not in IN_MANY:
            ctx.fail(f"{args[0]} works in one process; start it without a launcher")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; Ctrl-C ends it here, since some releases of Typer end it without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            return _say("interrupted", INTERRUPTED)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table of verbs without importing one."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastvideo ARGV`; return the exit code.

    0 ok, 1 failed, 2 usage, 130 interrupted, 143 terminated.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        env.check_launcher()
    except ValueError as error:  # without which nobody knows who speaks
        sys.stderr.write(f"error: {one_line(error)}\n")
        return USAGE
    try:
        with termination.raising():
            log.configure()
            if isinstance(sys.stdout, io.TextIOWrapper):  # a file name need not be UTF-8
                sys.stdout.reconfigure(errors="backslashreplace")
            env.bound_spinning()  # before torch starts its threads
            result = _group().main(args or ["--help"], prog_name="fastvideo", standalone_mode=False)
        return result if isinstance(result, int) else OK
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", INTERRUPTED)
    except Terminated:
        return TERMINATED if env.rank() > 0 else _say("terminated", TERMINATED)
    except UsageError as error:
        where = error.ctx.command_path if error.ctx else "fastvideo"
        return _say(f"error: {error.format_message()} (see {where} --help)", USAGE)
    except Exception as error:
        if env.log_level() == "DEBUG":
            raise
        return _say(
            f"error: {one_line(error)}", USAGE if isinstance(error, RefusedError) else FAILED
        )
    finally:
        termination.clean_up()  # nothing, unless a signal came amid a clean-up


def _group() -> Any:
    # Plain help: rich's tables would cost more than everything else that --help does.
    app = typer.Typer(
        cls=Verbs,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    return typer.main.get_command(app)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastvideo {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_version, is_eager=True
    ),
) -> None:
    """Train, distil and serve few-step Wan-style video models."""


def _command(verb: str) -> Any:
    target, text = VERBS[verb]
    module, _, name = target.partition(":")
    found = getattr(import_module(module), name)
    app = found if isinstance(found, typer.Typer) else typer.Typer(rich_markup_mode=None)
    if app is not found:
        app.command(verb, help=found.__doc__ or text)(found)
    for info in app.registered_commands:
        info.cls = Verb
    command = typer.main.get_command(app)
    command.name = verb
    return command


def _say(message: str, code: int) -> int:
    if env.rank() > 0:  # the first process says the same; its launcher ends this one meanwhile
        time.sleep(_FIRST_SPEAKS_S)
    sys.stderr.write(message + "\n")
    return code
