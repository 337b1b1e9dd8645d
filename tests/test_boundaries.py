"""Who may import whom, and what importing may do: the rules of docs/architecture.md, held by reading the code."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import normuon_plugins

PACKAGE = Path(normuon_plugins.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FRAMEWORKS = {"lightning", "pytorch_lightning", "accelerate", "transformers", "peft", "trl"}
PURE = ("orthogonalize", "update_rules", "layout", "buckets")


def imports(path):
    """Return the dotted names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(path):
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("name", PURE)
def test_mathematics_imports_torch_and_the_standard_library_only(name):
    path = PACKAGE / "core" / f"{name}.py"
    assert roots(path) <= {"torch", *sys.stdlib_module_names}
    for imported in imports(path):
        assert not imported.startswith(("torch.distributed", "torch.optim", "torch.nn"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path):
    place = path.relative_to(PACKAGE).parts[0]
    allowed = {
        "lightning": {"lightning"},
        "accelerate": {"accelerate"},
        "hf_trainer": {"transformers"},
    }.get(place, set())
    assert roots(path) & FRAMEWORKS <= allowed
    own = {name for name in imports(path) if name.startswith("normuon_plugins.")}
    if place == "core":
        assert all(name.startswith("normuon_plugins.core.") for name in own)
    elif allowed:
        other_adapters = {"lightning", "accelerate", "hf_trainer"} - {place}
        assert not any(name.split(".")[1] in other_adapters for name in own)
    if place != "core" or path.name not in ("optimizer.py", "matrix_step.py"):
        assert "normuon_plugins.core.update_rules.normuon_direction" not in own


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_environment_and_no_compilation_at_import(path):
    tree = ast.parse(path.read_text())
    attributes = {(getattr(n.value, "id", None), n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not attributes & {("os", "environ"), ("os", "getenv"), ("torch", "compile")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_level_mutable_state(path):
    """A module-level name bound to a dict or list is a constant: upper case, and never written to in its file."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, (ast.Dict, ast.List, ast.Set)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            assert target.id.isupper() or target.id == "__all__"
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))


def test_importing_the_package_loads_no_framework_and_changes_nothing():
    program = """
import json, os, sys, torch
before = dict(os.environ)
import normuon_plugins, normuon_plugins.core.build
print(json.dumps([sorted(name for name in sys.modules if "." not in name), dict(os.environ) == before]))
"""
    modules, unchanged = json.loads(subprocess.check_output([sys.executable, "-c", program], text=True))
    assert not FRAMEWORKS & set(modules)
    assert unchanged


def test_importing_the_trainer_adapter_registers_nothing():
    program = """
import normuon_plugins.hf_trainer
from transformers.training_args import OptimizerNames
print("normuon" in [member.value for member in OptimizerNames])
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_adapter_files_stay_translations():
    for place in ("lightning", "accelerate", "hf_trainer"):
        for path in (PACKAGE / place).glob("*.py"):
            assert len(path.read_text().splitlines()) <= 150
