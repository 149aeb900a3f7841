"""Imports point down only: read from the source files, so that an import inside a function counts too.

What stands under `if TYPE_CHECKING:` is never imported and does not count.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = (
    {"errors", "plugins", "config", "schedules", "schema", "payloads", "redact", "storage"},
    {"head"},
    {"losses", "models", "checkpoint", "metrics", "ray_metrics", "trackers", "locks", "refusal"},
    {"data", "teacher", "trainer", "eval", "export"},
    {
        "benchmarks",
        "cluster",
        "submission",
        "layout",
        "elastic",
        "run_folder",
        "launch",
        "progress",
        "heldout",
        "summary",
        "results",
        "doctor",
        "validate",
        "objectives",
        "teacher_cache",
        "evaluation",
        "plot",
        "evaluation_report",
        "report",
    },
    {"pipeline"},
    {"preflight", "plan"},
    {"cli"},
    {"__main__", "jobs"},
)
"""From the bottom up. A part imports itself and what is below its layer."""

NEIGHBOURS = {0, 4}
"""Layers whose parts may import each other: the vocabulary, and what composes the stages beside the pipeline."""

REFUSED: dict[str, set[str]] = {
    **{part: {"torch", "ray", "deepspeed", "transformers"} for part in LAYERS[0]},
    "head": {"ray", "deepspeed", "transformers"},
    "losses": {"ray", "deepspeed", "transformers"},
    "models": {"ray", "deepspeed"},
}
"""Part -> packages it never imports."""

FILES = sorted([*Path("ray_kd").rglob("*.py"), *Path("jobs").glob("*.py")])


def part_of(path: Path) -> str:
    return path.parts[0] if path.parts[0] == "jobs" else path.parts[1].removesuffix(".py")


def layer_of(part: str) -> int:
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names that are imported anywhere below the node; `from a import b` counts as a.b."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for statement in node.orelse:
            yield from imports(statement)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    else:
        for child in ast.iter_child_nodes(node):
            yield from imports(child)


def imports_of(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text())))


def parts_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports_of(path) if name.startswith("ray_kd.")}


def test_every_part_has_a_layer():
    parts = {part_of(path) for path in FILES} - {"__init__"}
    assert parts == set().union(*LAYERS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    if path == Path("ray_kd/__init__.py"):
        assert parts_imported(path) == set()
        return
    part = part_of(path)
    layer = layer_of(part)
    for imported in parts_imported(path) - {part}:
        below = layer_of(imported) < layer or (layer_of(imported) == layer and layer in NEIGHBOURS)
        assert below, f"{path} imports ray_kd.{imported}, which is not below {part}"


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) in REFUSED], ids=str)
def test_light_parts_import_nothing_heavy(path):
    packages = {name.split(".")[0] for name in imports_of(path)}
    assert packages & REFUSED[part_of(path)] == set()


def test_the_check_sees_imports_inside_functions_and_not_those_for_types():
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
else:
    import numpy
def f():
    with open("x"):
        from ray_kd import models
"""
    assert set(imports(ast.parse(source))) == {"typing.TYPE_CHECKING", "numpy", "ray_kd.models"}


def test_the_pipeline_is_light_to_import():
    """Ray Train's controller and the stream's processes import it before anything starts: seconds of the first step."""
    code = "import sys, ray_kd.pipeline; print({'torch', 'transformers', 'ray.data', 'deepspeed'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
