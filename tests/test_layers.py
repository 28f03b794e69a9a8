"""Data flows one way: a module imports only from layers below its own, and reading a run needs no torch."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up: a module may import from the layers named before its own. A package is one layer, except for the
# packages within it that are named here too.
LAYERS = (
    *("errors", "inputs", "metrics", "scale", "study", "scaffold"),
    "store",  # rows, and what becomes of them on disk: numpy and zarr
    *("store.places", "store.reading", "store.writing"),
    *("store.queries", "store.tables", "store.archives", "store.checking"),
    "inference",  # what may be said of what was recorded
    "report",  # all of it on a page
    *("onset", "watch", "telling"),  # what people want to be told of while they train
    *("sink", "interrupts"),  # what becomes of a training's rows when disks and people interfere
    *("selection", "untouched", "cadence", "continuing"),
    *("hosted", "devices"),
    *("decompose", "schedule", "behind"),  # singular values, and who works on them
    *("sources", "factors", "kinds", "accumulate", "groups", "hiding", "settings"),  # a gradient
    *("calls", "arguments", "adapters", "cases", "testing"),  # what an adapter is, and what it is tested with
    *("moves", "values", "modules", "composite", "bypass", "ops", "flow", "capture"),  # what a forward pass did
    *("outlets", "ownership", "pull", "contributions", "survey", "axes"),  # what a backward pass says about it
    *("gather", "audit", "owner_audit", "shadow", "prepare"),  # what is done with that
    *("session", "summarise", "finish", "standin"),  # one step, and its row
    *(
        *("attribution", "graph", "bounds"),
        *("links", "sizes"),
        "graphing",
        "probing",
        "measure",
        "variables",
        "func",
        "recorder",
        "recording",
    ),  # what users call
    "planning",  # what it will take, before it is done
    "door",  # `import gradtrace`: the public names
    "training",
    *("evidence", "advice", "rehearsal", "checkup"),  # what `gradtrace doctor` says
    *("plots", "demo", "cli"),
)
DOOR = "door"
WITHOUT_TORCH = (
    *("errors", "inputs", "metrics", "scale", "store", "inference", "report", "cadence"),
    *("onset", "watch", "telling", "attribution", "bounds"),
)


def modules() -> dict[str, Path]:
    """Module name below `gradtrace` -> file; the package's own front door is called `door`."""
    found = {}
    for path in sorted((ROOT / "gradtrace").rglob("*.py")):
        parts = path.relative_to(ROOT / "gradtrace").with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__") or DOOR] = path
    return found


def layer_of(module: str) -> str:
    """The layer a module belongs to: the innermost of its packages that is one, or itself."""
    parts = module.split(".")
    return next((here for n in range(len(parts), 0, -1) if (here := ".".join(parts[:n])) in LAYERS), parts[0])


def imports(path: Path) -> Iterator[str]:
    """Modules below `gradtrace` that a file imports anywhere, other than for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    types = {id(n) for node in ast.walk(tree) if _is_type_checking(node) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            base = node.module.split(".")
            if base[0] == "gradtrace":
                names = {alias.name for alias in node.names}
                yield from [".".join(base[1:]) or DOOR] if names != {"__version__"} else []
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "gradtrace"]
            yield from (name.removeprefix("gradtrace").removeprefix(".") or DOOR for name in names)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_every_package_is_installed() -> None:
    """From a checkout all of them are found; from a wheel only what is listed."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "gradtrace").rglob("__init__.py")}
    assert found | {"gradtrace_plugins"} == listed


def test_every_module_has_a_layer() -> None:
    found = {layer_of(name) for name in modules()}
    assert found - set(LAYERS) == set(), "place the new module in LAYERS: above everything that imports it"
    assert set(LAYERS) - found == set(), "a layer is empty"


@pytest.mark.parametrize("name", modules())
def test_imports_lead_to_lower_layers(name: str) -> None:
    own = layer_of(name)
    below = set(LAYERS[: LAYERS.index(own) + 1])
    upward = [target for target in imports(modules()[name]) if layer_of(target) not in below]
    assert upward == [], f"{name} imports from a layer above its own"


def test_no_two_modules_import_each_other() -> None:
    """Within a package, too, there is an order."""
    names = modules()
    graph = {name: {t for t in imports(path) if t in names and t != name} for name, path in names.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def test_adapters_use_only_what_is_offered_to_adapters() -> None:
    """The built-in ones have no other door than anybody's."""
    offered = {"calls", "factors", "sources", "hosted", "errors"}
    for path in sorted((ROOT / "plugins").glob("*.py")):
        assert set(imports(path)) <= offered, path.name


@pytest.mark.parametrize("name", [name for name in modules() if name.split(".")[0] in WITHOUT_TORCH])
def test_reading_a_run_needs_no_torch(name: str) -> None:
    source = modules()[name].read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import torch|from torch)", source, re.MULTILINE)


def test_the_front_door_and_the_command_line_open_without_torch() -> None:
    code = "import sys, gradtrace, gradtrace.cli; gradtrace.open_run; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
