"""The house's rules, read out of its own source: who may import whom, what lives where, how big.

Standard library only. A table here changes in the commit that needs it, with a sentence of why.
"""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "fastvideo": "fastvideo",
    "fastvideo_inference": "inference/fastvideo_inference",
    "fastvideo_train": "train/fastvideo_train",
}
MAY_IMPORT = {
    "fastvideo": {"fastvideo"},
    "fastvideo_inference": {"fastvideo", "fastvideo_inference"},
    "fastvideo_train": {"fastvideo", "fastvideo_train"},
}

# The library's rooms, strictly downward: a room imports from those above it in this list. Rooms on
# one line may import each other as long as they make no circle.
LAYERS = [
    {
        *("", "__main__", "cli", "config", "env", "errors", "files", "foreign", "log", "registry"),
        # what a request may say is as low as what a folder says: a spec's defaults are its fields
        *("rng", "sampling", "shapes", "spec", "termination"),
    },
    {
        "attention",
        "cpu",
        "extent",
        "flow",
        "footage",
        "launched",
        "layers",
        "media",
        "parallel",
        "preview",
        "scenery",
        "timing",
        "weights",
        "worlds",
    },
    {"metrics", "models", "schedulers", "stock_few_step"},
    # a LoRA's note is judged before torch is loaded, so it cannot be in the room of `lora`; so is a
    # request, which is why `resolve` is no part of `stages`
    {
        *("capacity", "causal", "formats", "hub", "lora", "measure", "model", "packing", "resolve"),
        *("sample", "sampler_note", "stages"),
    },
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FORBIDDEN = {
    "attention": {"config", "env", "models", "spec"},
    "models": {"config", "env", "spec", "parallel"},
    "parallel": {"models"},
    "schedulers": {"config", "env", "spec", "models"},
}

# Third-party package: its one home. Several homes only for what is a language of its own here.
EVERYWHERE = {"numpy", "torch"}
COMMANDS = r"(inference|train)/fastvideo_\w+/commands/\w+\.py"
HOMES = {
    # what others wrote needs times, matrices and side data, which imageio does not show
    "av": r"fastvideo/(media|footage)\.py",
    "imageio": r"fastvideo/media\.py",
    "PIL": r"fastvideo/media\.py",
    "safetensors": r"fastvideo/weights\.py",
    "ftfy": r"fastvideo/models/text/tokenizer\.py",
    "tokenizers": r"fastvideo/models/text/tokenizer\.py",
    "huggingface_hub": r"fastvideo/hub\.py",
    "pydantic": r"fastvideo/(config|sampling|spec|parallel/degrees)\.py"
    r"|inference/fastvideo_inference/(recipe|comparison|engine/(config|journal)|goodput/(profile|quality))\.py"
    r"|train/fastvideo_train/(recipe|validate|export|(methods|strategies|data)/\w+)\.py",
    "typer": rf"fastvideo/cli\.py|{COMMANDS}",
    "rich": COMMANDS,
    "pyarrow": r"train/fastvideo_train/data/listing\.py",  # listings in parquet
    "tensorboard": r"train/fastvideo_train/logs\.py",
    "accelerate": r"train/fastvideo_train/strategies/accelerate\.py",
    "deepspeed": r"train/fastvideo_train/strategies/deepspeed\.py",
    "flash_attn": r"fastvideo/attention/backends/flash\.py",
    "flash_attn_interface": r"fastvideo/attention/backends/flash\.py",
    # the kernels are Triton's own language, in a file that is imported when a GPU is there
    "triton": r"fastvideo/attention/(backends/triton|triton_kernels)\.py",
    "gradio": r"demos/.*\.py",
    "simpy": r"inference/fastvideo_inference/goodput/simulate\.py",
    # the server's own language, in a folder that only `serve` imports
    "fastapi": r"inference/fastvideo_inference/serve/\w+\.py",
    "starlette": r"inference/fastvideo_inference/serve/\w+\.py",
    "uvicorn": r"inference/fastvideo_inference/serve/app\.py",
}
PEERS = {"diffusers", "transformers"}  # measured against in bench/ and tests/, never run on

# Called at import for their value alone, besides CapWords, which make values.
WORKLESS = set(
    re.findall(r"\w+", "cast compile field getLogger cos sin sqrt items join len values")
)
WORKLESS |= {"constexpr"}  # a constant of a Triton kernel
WORKLESS |= {"dict", "frozenset", "list", "range", "set", "sorted", "tuple", "zip"}

DECLARES = {"register_autograd"}  # the backward of an operator of our own, beside it

MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60

# What decides about a request, before it is known to be legal.
TORCH_FREE = [
    "fastvideo",
    "fastvideo.capacity",
    "fastvideo.cli",
    "fastvideo.config",
    "fastvideo.env",
    "fastvideo.extent",
    "fastvideo.files",
    "fastvideo.footage",
    "fastvideo.foreign",
    "fastvideo.formats",
    "fastvideo.hub",
    "fastvideo.log",
    "fastvideo.media",
    "fastvideo.parallel.degrees",
    "fastvideo.parallel.rules",
    "fastvideo.registry",
    "fastvideo.resolve",
    "fastvideo.rng",
    "fastvideo.sampler_note",
    "fastvideo.sampling",
    "fastvideo.shapes",
    "fastvideo.spec",
    "fastvideo.stages",
    "fastvideo_inference",
    "fastvideo_inference.commands",
    "fastvideo_inference.engine.engine",
    "fastvideo_inference.engine.executors.local",
    "fastvideo_inference.engine.executors.process",
    "fastvideo_inference.request",
    "fastvideo_inference.sharing",
    "fastvideo_train",
    "fastvideo_train.commands",
    "fastvideo_train.commands.data",
    "fastvideo_train.data.plan",
    "fastvideo_train.recipe",
]


# Reading the source


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def python_files(*folders: str) -> list[str]:
    found = (p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    return sorted(str(p.relative_to(ROOT)) for p in found)


IN_PACKAGES = python_files(*PACKAGES.values())
DEMOS = python_files("demos")
BENCH = [p for p in python_files("inference", "train") if "/bench/" in p]


def module_of(path: str) -> str:
    """Return the dotted name of a file in one of the packages."""
    parts = list(Path(path).with_suffix("").parts)
    start = next(i for i, part in enumerate(parts) if part in PACKAGES)
    return ".".join(parts[start:]).removesuffix(".__init__")


MODULES = {module_of(path): path for path in IN_PACKAGES}


def imports(path: str) -> Iterator[tuple[str, int]]:
    """Yield every imported module, wherever the import stands, as the longest name of ours."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module, f"{path}:{node.lineno} imports from nowhere"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in MODULES else node.module), node.lineno


def top(module: str) -> str:
    return module.partition(".")[0]


def room(module: str) -> str:
    """Return the library's room that a module is in; '' is the package itself."""
    return module.split(".")[1] if "." in module else ""


def strings_passed_to(path: str, *functions: str) -> Iterator[tuple[str, int]]:
    """Yield literal first arguments of calls such as importlib.import_module("x")."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and name_of(node.func) in functions and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value, node.lineno


def name_of(function: ast.expr) -> str:
    """Return the last part of a called name."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def calls(node: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls that run when `node` is executed: not those in the bodies of functions."""
    if isinstance(node, ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from calls(child)


def refuse(found: list[str], rule: str) -> None:
    assert not found, f"{rule}:\n  " + "\n  ".join(sorted(found))


# Who may import whom


def test_packages_import_only_towards_the_library():
    found = []
    for path in IN_PACKAGES:
        if (
            path == "fastvideo/__init__.py"
        ):  # the front door names what it forwards, for type checkers
            continue
        own = top(module_of(path))
        for module, line in [*imports(path), *strings_passed_to(path, "import_module")]:
            if top(module) in PACKAGES and top(module) not in MAY_IMPORT[own]:
                found.append(f"{path}:{line} imports {module}")
    refuse(found, "demos -> fastvideo_inference -> fastvideo <- fastvideo_train, nothing else")


def test_every_room_of_the_library_has_its_layer():
    rooms = {room(m) for m in MODULES if top(m) == "fastvideo"}
    assert rooms <= set(LEVEL), f"give {sorted(rooms - set(LEVEL))} a layer in LAYERS"


def _library_arrows(*, with_types: bool = True) -> Iterator[tuple[str, str, str]]:
    for path in python_files("fastvideo"):
        if path == "fastvideo/__init__.py":
            continue
        own = room(module_of(path))
        types = set() if with_types else _lines_for_type_checkers(path)
        for module, line in imports(path):
            if line not in types and top(module) == "fastvideo" and room(module) != own:
                yield own, room(module), f"{path}:{line}"


def _lines_for_type_checkers(path: str) -> set[int]:
    blocks = [n for n in ast.walk(tree(path)) if isinstance(n, ast.If)]
    lines = set()
    for block in blocks:
        if "TYPE_CHECKING" in ast.unparse(block.test):
            lines |= set(range(block.lineno, (block.end_lineno or 0) + 1))
    return lines


def test_library_imports_strictly_downward():
    found = [
        f"{where}: {own or 'fastvideo'} imports {other or 'fastvideo'}"
        for own, other, where in _library_arrows()
        if LEVEL[other] > LEVEL[own] or other in FORBIDDEN.get(own, ())
    ]
    refuse(found, "a room knows only those below it, and not those in FORBIDDEN")


def test_rooms_make_no_circle():
    graph: dict[str, set[str]] = {}
    for own, other, _ in _library_arrows(with_types=False):
        if other:  # the package itself holds only its version and names
            graph.setdefault(own, set()).add(other)
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"rooms import each other in a circle: {' -> '.join(error.args[1])}")


def test_demos_use_only_public_names():
    public = _public_names()
    found = []
    for path in DEMOS:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names if top(a.name) in PACKAGES]
                found += [f"{path}:{node.lineno} imports {n}" for n in names if n != "fastvideo"]
            elif isinstance(node, ast.ImportFrom) and top(node.module or "") in PACKAGES:
                names = [a.name for a in node.names if a.name not in public]
                if node.module != "fastvideo" or names:
                    found.append(f"{path}:{node.lineno} imports {names} from {node.module}")
    refuse(found, f"demos import from fastvideo, and of it {sorted(public)}")


def _public_names() -> set[str]:
    for node in tree("fastvideo/__init__.py").body:
        if isinstance(node, ast.Assign) and name_of(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("fastvideo/__init__.py has no __all__")


# What lives where


def test_every_third_party_package_has_one_home():
    found = []
    for path in [*IN_PACKAGES, *DEMOS]:
        for module, line in [*imports(path), *strings_passed_to(path, "import_module")]:
            package = top(module)
            if package in sys.stdlib_module_names | PACKAGES.keys() | EVERYWHERE:
                continue
            if path in DEMOS and f"demos/{package}.py" in DEMOS:  # another part of the page
                continue
            if not re.fullmatch(HOMES.get(package, "none"), path):
                found.append(f"{path}:{line} imports {package}: {HOMES.get(package, 'no home')}")
    refuse(found, "one home for each third-party package")


def test_benchmarks_add_only_the_peers_that_they_measure():
    found = []
    for path in BENCH:
        for module, line in imports(path):
            known = sys.stdlib_module_names | PACKAGES.keys() | EVERYWHERE | HOMES.keys() | PEERS
            known |= {Path(other).stem for other in BENCH}  # a part of the same benchmark
            if top(module) not in known:
                found.append(f"{path}:{line} imports {module}")
    refuse(found, "a benchmark may also import diffusers and transformers")


def test_environment_is_read_in_one_module():
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    found = [
        f"{path}:{node.lineno} uses {node.attr if isinstance(node, ast.Attribute) else node.name}"
        for path in [*IN_PACKAGES, *DEMOS]
        if path != "fastvideo/env.py"
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.alias) and node.name in names)
    ]
    refuse(found, "only fastvideo/env.py reads the environment")


def test_environment_has_at_most_five_variables():
    reads = strings_passed_to("fastvideo/env.py", "get", "getenv")
    assert len({name for name, _ in reads}) <= 5


# How it is written


def test_no_global_statement():
    found = [
        f"{path}:{node.lineno}"
        for path in [*IN_PACKAGES, *DEMOS, *BENCH]
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Global)
    ]
    refuse(found, "pass it, or keep it in an object")


def test_no_print_outside_commands():
    found = [
        f"{path}:{node.lineno}"
        for path in IN_PACKAGES
        if "/commands/" not in path
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    refuse(found, "commands print, everything else logs or returns")


def test_no_getattr_with_a_default_but_for_a_module_s_optional_constant():
    found = [
        f"{path}:{node.lineno}"
        for path in IN_PACKAGES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and name_of(node.func) == "getattr"
        and len(node.args) == 3
        and not re.fullmatch(r"'[A-Z0-9_]+'", ast.unparse(node.args[1]))
    ]
    refuse(found, "a default that hides a missing field is a bug that waits")


def test_importing_does_no_work():
    found = []
    for path in [*IN_PACKAGES, *DEMOS]:
        if path.endswith("__main__.py"):
            continue
        for node in _executed(tree(path).body):
            for call in calls(node):
                name = name_of(call.func)
                is_value = bool(re.match(r"_?[A-Z]", name)) or name in WORKLESS
                if (isinstance(node, ast.Expr) or not is_value) and name not in DECLARES:
                    found.append(f"{path}:{call.lineno} calls {ast.unparse(call.func)}")
    refuse(found, "modules and classes are made of values; work waits until it is asked for")


def _executed(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run on import, without functions, decorators and `if __name__`."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _executed(node.body)
        elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_every_module_says_what_it_is():
    found = [
        path for path in [*IN_PACKAGES, *DEMOS] if not (ast.get_docstring(tree(path)) or "").strip()
    ]
    refuse(found, "a module opens with one sentence")


def _lengths() -> dict[str, int]:
    lengths = {}
    for path in [*IN_PACKAGES, *DEMOS, *BENCH]:
        num_lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_FILE_LINES:
            lengths[path] = num_lines
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or 0) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    lengths[f"{path}:{node.name}"] = num_lines
    return lengths


def test_files_and_functions_are_short():
    found = [f"{name}: {count} lines" for name, count in _lengths().items()]
    refuse(found, f"a file has {MAX_FILE_LINES} lines at most, a function {MAX_FUNCTION_LINES}")


# What it costs to import, and what the configs are


def test_what_decides_about_a_request_imports_without_torch():
    code = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
        "    assert 'numpy' not in sys.modules or name != 'fastvideo', f'{name} imports numpy'\n"
    )
    paths = [str(ROOT / p) for p in (".", "inference", "train")]
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = {paths!r}\n{code}",
            json.dumps(TORCH_FREE),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "path", sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("configs/**/*"))
)
def test_configs_are_toml(path):
    if (ROOT / path).is_dir():
        return
    assert path.endswith((".toml", ".md", ".json", ".txt")), f"{path}: runs are TOML"
    if path.endswith(".toml"):
        tomllib.loads((ROOT / path).read_text(encoding="utf-8"))


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    declared = {re.split(r"[\[<>=!~; ]", line)[0].lower().replace("-", "_") for line in lines}
    names = {"PIL": "pillow", "flash_attn_interface": "flash_attn"}
    wanted = {names.get(package, package) for package in HOMES.keys() | EVERYWHERE | PEERS}
    assert wanted <= declared, f"not in pyproject.toml: {sorted(wanted - declared)}"
