"""What no module does, read from the source files: it holds for code that no test runs, too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = sorted([*Path("ray_kd").rglob("*.py"), *Path("jobs").glob("*.py")])

BETWEEN_PROCESSES = {("ray_kd/data/prepare.py", "pickle.loads")}
"""Rows of a Ray Data pass that this run's own tasks made a moment ago, in Ray's memory: Ray pickles whatever it moves.
They are in no file, and who could change them runs code in the cluster already."""

HAS_NO_CODE = {"GenerationConfig.from_pretrained"}
"""Numbers from a JSON file: takes no trust_remote_code."""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(name as it is written, aliases resolved, call) of each call in a file."""
    tree = ast.parse(path.read_text())
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            first, dot, rest = name.partition(".")
            yield aliases.get(first, first) + dot + rest, node


def option(call: ast.Call, name: str) -> object:
    """The literal given for a keyword; None where it is not given."""
    found = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else found


def problem(name: str, call: ast.Call) -> str | None:
    """Why a call is not allowed."""
    module, _, function = name.rpartition(".")
    if module.split(".")[-1] in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve") and function in (
        "load", "loads", "Unpickler", "open"
    ):  # fmt: skip
        return "runs what a file says"
    if name == "torch.load" and option(call, "weights_only") is not True:
        return "unpickles without weights_only=True"
    if name in ("numpy.load", "pandas.read_pickle") and option(call, "allow_pickle") is not False:
        return "may unpickle"
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"):
        return "builds any object"
    if name in ("eval", "exec", "os.system", "os.popen", "__import__"):
        return "runs a text"
    if option(call, "shell") is not None:
        return "runs a shell"
    if function == "from_pretrained" and not name.endswith(tuple(HAS_NO_CODE)):
        trusts = option(call, "trust_remote_code")
        return None if trusts is False else f"trust_remote_code is {trusts}"
    if function in ("load_dataset", "load_from_disk") and option(call, "trust_remote_code") not in (None, False):
        return "trusts code"
    return None


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_module_runs_nothing_that_a_file_brings(path):
    found = [(name, call.lineno, why) for name, call in calls(path) if (why := problem(name, call)) is not None]
    assert [one for one in found if (str(path), one[0]) not in BETWEEN_PROCESSES] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "from pickle import loads as read\nread(b'')", "import torch\ntorch.load(p)",
        "import torch as t\nt.load(p, weights_only=False)",
        "import numpy as np\nnp.load(p)", "import yaml\nyaml.load(s)",
        "from numpy import load\nload(p, allow_pickle=True)", "eval(text)", "subprocess.run(c, shell=True)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(p)",
        "AutoConfig.from_pretrained(p, trust_remote_code=trust)", "datasets.load_dataset(p, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_each_of_them_would_be_found(tmp_path, source):
    (tmp_path / "module.py").write_text(source)
    assert [name for name, call in calls(tmp_path / "module.py") if problem(name, call)]


def test_the_exceptions_are_still_there():
    """An exception that nothing needs any more is removed from the list."""
    assert {
        (str(path), name) for path in FILES for name, call in calls(path) if problem(name, call)
    } == BETWEEN_PROCESSES
