"""Sampling fields are declared once: flags, keywords, keys and recipes have them from there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_overloads, get_type_hints

import pytest
from fastvideo_inference import comparison
from fastvideo_inference.commands.eval import evaluate
from fastvideo_inference.commands.generate import generate
from fastvideo_inference.pipeline import VideoPipeline
from fastvideo_inference.recipe import Recipe
from fastvideo_inference.request import flag_of
from fastvideo_train import validate
from pydantic import BaseModel

from fastvideo import cli, sampling, spec
from fastvideo.sampling import GenerateRequest, SamplingParams, Setting, settings

SHORT = {setting.alias or name: name for name, setting in settings().items()}
"""Every field by the name that people type."""
WORLDS = {"num_frames", "height", "width", "fps", "seed"}
"""What two rows of a comparison must share, since the truth and the noise depend on it."""


def rules(hint: Any) -> tuple[Any, ...]:
    """Return what is annotated to a type or to the alternative of None."""
    if get_origin(hint) is Annotated:
        return tuple(get_args(hint)[1:])
    return next((found for part in get_args(hint) if (found := rules(part))), ())


def declared(model: type[BaseModel]) -> Mapping[str, tuple[Any, ...]]:
    """Return the rules of a model's fields."""
    return {name: rules(hint) for name, hint in get_type_hints(model, include_extras=True).items()}


FIELDS = declared(GenerateRequest)


def assert_declared(model: type[BaseModel], *, but: set[str] = frozenset()) -> set[str]:
    """Check that fields of these names have the declared type; return their full names."""
    found = set()
    for key, own in declared(model).items():
        name = SHORT.get(key, key)
        if name in FIELDS and key not in but:
            assert own[: len(FIELDS[name])] == FIELDS[name], f"{model.__name__}.{key}"
            found.add(name)
    return found


def flags(command: Any) -> Iterator[tuple[str, Any]]:
    """Yield the flags of a command, with the parameter that each sets."""
    (made,) = [verb for verb, (target, _) in cli.VERBS.items() if target.endswith(command.__name__)]
    for parameter in cli._command(made).params:
        for flag in (*parameter.opts, *parameter.secondary_opts):
            yield flag, parameter


def test_a_request_and_its_complete_parameters_have_the_same_fields():
    assert list(GenerateRequest.model_fields) == list(SamplingParams.model_fields)
    assert list(GenerateRequest.model_fields) == list(settings())
    assert assert_declared(SamplingParams) == set(settings())
    for name, setting in settings().items():
        assert [rule for rule in FIELDS[name] if isinstance(rule, Setting)] == [setting]


def test_the_table_of_the_page_is_the_declaration():
    page = (Path(__file__).parents[1] / "inference" / "README.md").read_text()
    table = page.partition("## Fields of a request\n")[2].partition("\n\n")[0].splitlines()
    cells = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in table[2:]]
    assert cells == [[k, one.alias, flag_of(k), one.help] for k, one in settings().items()]


def test_short_names_are_names_of_nothing_else():
    aliases = [setting.alias for setting in settings().values() if setting.alias]
    assert len({*aliases, *settings(), "size"}) == len(aliases) + len(settings()) + 1


def test_keywords_of_a_call_are_the_fields_and_what_a_caller_alone_can_bring():
    signature = inspect.signature(VideoPipeline.__call__)
    keywords = [name for name in signature.parameters if name != "self"]
    others = ["count", "latents", "output", "budget", "callback_on_step_end", "foreign"]
    assert keywords == [*settings(sampling.PYTHON), *others]
    *_, typed = get_overloads(VideoPipeline.__call__)
    own = {name: signature.parameters[name].annotation for name in keywords[1:-1]}
    del own["count"]  # which makes a list, by another overload
    own["seed"] = "int | None"  # several seeds make a list, too
    seen = inspect.signature(typed).parameters
    assert {k: seen[k].annotation for k in list(seen)[2:]} == own, "type checkers see the same"
    defaults = {signature.parameters[name].default for name in settings(sampling.PYTHON)}
    assert defaults == {None}, "a prompt by either name, and the model's own defaults"


@pytest.mark.parametrize(
    ("command", "where", "others"),
    [
        (generate, sampling.CLI, set()),
        # a world has the prompts; how many of them is no field of a clip
        (evaluate, sampling.EVAL, {"prompt"}),
    ],
)
def test_flags_of_a_command_are_the_fields_that_may_be_set_there(command, where, others: set[str]):
    found = dict(flags(command))
    wanted = {name: flag_of(name) for name in settings(where) if name not in others}
    for name, flag in wanted.items():
        if flag == "the prompt":
            # some pairs of Typer and click lose the help of an argument on the way
            (argument,) = get_type_hints(command, include_extras=True)["prompt"].__metadata__
            assert argument.help == settings()[name].help
        elif flag != "--size":
            # what is done without it may follow in brackets, or that it may be repeated
            assert found[flag].help.startswith(settings()[name].help) or flag == "--seed"
    assert set(wanted.values()) - {"the prompt"} <= found.keys()
    spelled = {flag_of(name) for name in settings()} - {"the prompt"}
    assert found.keys() & spelled == set(wanted.values()) - {"the prompt"}, "and no others"


def test_defaults_of_a_spec_are_the_fields_that_a_model_can_know():
    known = set(settings()) - {"prompt", "seed", "lora", "attention", "backend", "drop_gates"}
    assert assert_declared(spec.Defaults) == known
    assert spec.Defaults.model_fields.keys() - known == {"max_text_tokens"}
    assert assert_declared(spec.Sampler, but={"attention"}) <= known


def test_rows_of_a_comparison_set_the_fields_that_leave_prompts_and_noise_alike():
    fields = set(settings(sampling.EVAL)) - WORLDS - {"prompt"}
    assert assert_declared(comparison.Row) == fields
    shared = assert_declared(comparison.Settings)
    assert shared <= WORLDS and set(comparison.SHARED) == WORLDS


def test_validation_renders_by_declared_fields():
    for table in (validate.Clips, validate.Prompts):
        assert {"num_frames", "height", "width", "fps"} <= assert_declared(table)
    assert {"num_inference_steps", "guidance_scale"} <= assert_declared(validate.Prompts)


def test_a_recipe_holds_complete_parameters():
    assert get_type_hints(Recipe)["request"] is SamplingParams
