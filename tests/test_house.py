"""The house: imports point down, the public surface is what it says, every file opens with why it exists."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import longfit

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "longfit"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "errors": 0,
    "words": -1,  # below all: what anybody says passes it
    "notice": 0,
    "numerics": 0,
    "compat": 0,
    "files": 1,
    "kernels": 1,
    "layers": 2,
    "optim": 2,
    "attention": 2,
    "engine": 3,
    "model": 4,
    "data": 4,
    "parallel": 4,
    "config": 5,
    "planning": 5,
    "training": 6,
    "evaluation": 7,
    "exporting": 8,
    "demo": 8,
    "cli": 9,
    "board": 9,
    "__main__": 10,
}


def room(module: str) -> str:
    """``longfit.engine.sweep.install`` lives in ``engine``."""
    return module.split(".")[1]


def imported(path: Path) -> set[str]:
    """Names of the longfit modules that a file imports, wherever in the file it does so."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "longfit"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != PACKAGE or f.name != "__init__.py"], ids=module_name)
def test_imports_point_down(path: Path) -> None:
    own = room(module_name(path))
    for name in imported(path):
        assert name != "longfit", f"{path}: import the module, not the package root"
        assert room(name) in FLOORS, f"{path}: unknown room {name}"
        other = room(name)
        assert other == own or FLOORS[other] < FLOORS[own], f"{path}: {own} (floor {FLOORS[own]}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_opens_with_why_it_exists(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path}: no module docstring"


def test_public_names_exist_and_are_few() -> None:
    assert len(longfit.__all__) <= 30
    for name in longfit.__all__:
        assert getattr(longfit, name) is not None


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'triton', 'bitsandbytes'}"
    code = f"import sys, longfit; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    assert result.stdout.strip() == "[]"


def test_the_paper_map_names_what_exists() -> None:
    rows = re.findall(r"`(src/longfit/[\w/]+\.py):(\w+)`", (ROOT / "docs" / "paper_map.md").read_text())
    assert len(rows) > 20
    for file, symbol in rows:
        assert getattr(importlib.import_module(module_name(ROOT / file)), symbol) is not None
    for file in re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)`", (ROOT / "docs" / "paper_map.md").read_text()):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name != "compat"], ids=module_name)
def test_private_names_of_libraries_are_used_in_compat_alone(path: Path) -> None:
    """What a library does not promise stands in one room, each with a test that says what breaks without it."""
    tree = ast.parse(path.read_text())
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr)]
    names = [node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    functions = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    written = {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and is_ours(node.value)}
    own = written | {node.target.id for node in names if isinstance(node.target, ast.Name)} | set(functions)
    foreign = {node.attr for node in attributes if node.attr not in own and not is_ours(node.value)}
    foreign |= {node.attr for node in attributes if node.attr in vars(torch.nn.Module()) and node.attr not in own}
    assert foreign <= {"_exit", "_current_frames"}, "Python documents these two; the others go through compat/"
    imports = [name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in imported_names(node)]
    assert not [name for name in imports if any(map(is_private, name.split("."))) and not name.startswith("longfit.")]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_ours(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def imported_names(node: ast.ImportFrom) -> list[str]:
    return [f"{node.module}.{alias.name}" for alias in node.names]


# ------------------------------------------------------------------------------------------------ tests
TESTS = ROOT / "tests"
ELSEWHERE = {
    "__main__": ("cli/test_border.py", "starts the command line as python -m longfit"),
    "attention/backends/cpp": ("kernels/cpu/test_attention.py", "hands a tile to the kernels, which are tried there"),
    "compat/torch_distributed": ("parallel/test_shard.py", "needs processes"),
    "config/description": ("cli/test_advice.py", "longfit explain prints it"),
    "errors": ("cli/test_border.py", "which error ends a command how"),
    "evaluation/demo_report": ("test_demo.py", "the demo's page"),
    "evaluation/drift": ("exporting/test_merge.py", "how far a merged model is from the trained one"),
    "files/checksums": ("model/test_save.py", "seals what is saved"),
    "files/expansion": ("data/test_containers.py", "bounds what an archive unpacks to"),
    "kernels/reference": ("kernels/test_dispatch.py", "numerics behind the signatures of the table"),
    "layers/experts_forward": ("layers/test_experts.py", "what transformers' experts interface calls"),
    "model/adapter_weights": ("exporting/test_merge.py", "reads what a merge adds"),
    "numerics/labels": ("data/test_packing.py", "one constant"),
    "parallel/processes": ("parallel/test_launch.py", "needs processes"),
    "training/rehearsal": ("cli/test_train.py", "longfit train --dry-run"),
}
"""Modules whose tests lie in another room or at the end of a longer way, and why."""
BEHAVIOUR = {
    "attention/backends/test_sinks": "every backend",
    "cli/test_advice": "all messages against all settings and options",
    "cli/test_border": "all verbs",
    "cli/test_mixtures": "mixtures of experts through all verbs",
    "data/test_cases": "all kinds of data, through the whole room",
    "engine/loss/test_cross_entropy_kernel": "the tiled loss with and without its kernel",
    "engine/sweep/test_memory": "bytes a token of the whole engine",
    "evaluation/test_lm_evaluation_harness": "another tool on our folders",
    "exporting/test_smollm2": "the demo model, to every format that llama.cpp reads",
    "kernels/cpu/test_neon": "all kernels under an emulator",
    "kernels/test_lazy": "what importing starts",
    "kernels/triton/test_compiled": "all kernels, compiled for cards",
    "model/test_conv1d": "GPT-2's layers from loading to merging",
    "optim/test_crashes": "processes that die",
    "parallel/test_combinations": "all ways of sharing at once",
    "parallel/test_replicas": "processes with the same weights",
    "training/test_chat_run": "a run on chats, to its end",
    "training/test_new_tokens": "a run that trains new rows, to its end",
    "training/test_paged_run": "a run with paged state, to its end",
}
"""Test files that mirror no module: what they try has no one home."""


def path_name(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def test_every_module_has_tests_where_they_are_looked_for() -> None:
    """In the file of its name, or in one of its room that imports it, or in those of modules that are made of it."""
    modules = {path_name(path, PACKAGE): imported(path) for path in FILES if path.name != "__init__.py"}
    tests = {path_name(path, TESTS): imported(path) for path in TESTS.rglob("*.py")}
    found = {name for name in modules if name_of_test(name) in tests or is_used(name, tests)}
    while more := {name for name in modules.keys() - found if is_used(name, {user: modules[user] for user in found})}:
        found |= more
    assert modules.keys() - found == ELSEWHERE.keys()
    assert [place for place, _ in ELSEWHERE.values() if not (TESTS / place).is_file()] == []


def test_every_test_file_has_the_name_of_what_it_tries() -> None:
    modules = {path_name(path, PACKAGE).removesuffix("/__init__") for path in FILES}
    rooms = {name for name in FLOORS if (PACKAGE / name).is_dir()}
    strangers = set()
    for path in TESTS.rglob("test_*.py"):
        name = path_name(path, TESTS)
        folder, _, file = name.rpartition("/")
        source = file.removeprefix("test_")
        package = folder.rpartition("/")[2] == source  # backends/test_backends.py is of backends/__init__.py
        if name.split("/")[0] in rooms and f"{folder}/{source}" not in modules and not (package and folder in modules):
            strangers.add(name)
    assert strangers == BEHAVIOUR.keys()


def name_of_test(module: str) -> str:
    folder, slash, name = module.rpartition("/")
    return f"{folder}{slash}test_{name}"


def is_used(module: str, users: dict[str, set[str]]) -> bool:
    """Whether one of the users, of the module's own room, imports it."""
    dotted = "longfit." + module.replace("/", ".")
    own = [names for user, names in users.items() if user.split("/")[0] == module.split("/")[0]]
    return any(name == dotted or name.startswith(f"{dotted}.") for names in own for name in names)
