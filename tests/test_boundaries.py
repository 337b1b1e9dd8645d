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
REGEX_USERS = {
    "layout.py",
    "plan_table.py",
    "parameter_plan.py",
    "parameter_rules.py",
    "model_facts.py",
    "cli.py",
}  # re.compile, not torch.compile
COMPILERS = {"directions.py"}  # where the user asks for it
PURE = ("newton_schulz", "orthogonalize", "step_size", "update_rules", "layout", "momentum", "compensation")
# The mathematics and the movement of tensors know nothing of each other; these bring them together.
MEETING_POINTS = {
    "gradient_squares.py",
    "stacks.py",
    "team_plan.py",
    "compared_facts.py",
    "step_plan.py",
    "matrix_step.py",
    "step.py",
    "optimizer_state.py",
    "exchange_report.py",
    "metrics.py",
    "shared_work.py",
    "loading.py",
    "parameter_plan.py",
}


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
    assert roots(path) <= {"torch", "normuon_plugins", *sys.stdlib_module_names}
    for imported in imports(path):
        assert not imported.startswith(("torch.distributed", "torch.optim", "torch.nn"))
        if imported.startswith("normuon_plugins.core."):
            assert imported.split(".")[2] in PURE


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers(path):
    place = path.relative_to(PACKAGE).parts[0]
    allowed = {
        "config_model.py": {"transformers"},
        "lightning": {"lightning"},
        "accelerate": {"accelerate"},
        "hf_trainer": {"transformers"},
    }.get(place, set())
    if (place, path.name) == ("tuning", "language_model.py"):
        allowed = {"transformers"}  # inside the functions that the command calls
    assert roots(path) & FRAMEWORKS <= allowed
    own = {name for name in imports(path) if name.startswith("normuon_plugins.")}
    if place == "core":
        movement = {name for name in own if name.startswith("normuon_plugins.distributed.")}
        assert not movement or path.name in MEETING_POINTS
        assert all(name.startswith("normuon_plugins.core.") for name in own - movement)
    elif place == "distributed":
        assert all(name.startswith("normuon_plugins.distributed.") for name in own)
    elif place == "tuning":
        assert {name.split(".")[1] for name in own} <= {"core", "distributed", "tuning", "extras"}
    elif allowed:
        other_adapters = {"lightning", "accelerate", "hf_trainer"} - {place}
        assert not any(name.split(".")[1] in other_adapters for name in own)


def test_nobody_imports_the_command_line():
    users = {path.name for path in FILES if any(name.startswith("normuon_plugins.cli") for name in imports(path))}
    assert users == {"__main__.py"}


def test_diagnostics_are_imported_by_those_who_ask_for_a_report():
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if path.parent.name != "diagnostics"
        and any(name.startswith("normuon_plugins.diagnostics") for name in imports(path))
    }
    assert users == {"cli.py", "lightning/diagnostics.py", "hf_trainer/diagnostics.py"}


def test_tuning_is_imported_by_the_command_line_alone_and_its_files_are_small():
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if path.parent.name != "tuning" and any(name.startswith("normuon_plugins.tuning") for name in imports(path))
    }
    assert users == {"cli.py"}
    for path in (PACKAGE / "tuning").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 150


def test_what_decides_which_rates_are_tried_is_free_of_torch():
    for name in ("grid", "search", "comparison", "reading"):
        path = PACKAGE / "tuning" / f"{name}.py"
        assert roots(path) <= {"normuon_plugins", *sys.stdlib_module_names}
        assert all(found.startswith("normuon_plugins.tuning") for found in imports(path) if "normuon" in found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_environment_is_read_and_nothing_is_compiled(path):
    words = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(ast.parse(path.read_text()))}
    assert not words & {"environ", "getenv", "compile"} - (
        {"compile"} if path.name in REGEX_USERS | COMPILERS else set()
    )
    assert not any(name.startswith(("os.environ", "os.getenv", "torch.compile")) for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_level_mutable_state(path):
    """Whatever can be written to at module level is a constant, and nothing in the file writes to it."""
    tree = ast.parse(path.read_text())
    mutable = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
    constants = set()
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            called = getattr(getattr(node.value, "func", None), "id", None)
            assert called not in ("dict", "list", "set", "defaultdict", "OrderedDict")
            if isinstance(node.value, mutable):
                assert target.id.isupper() or target.id == "__all__"
                constants.add(target.id)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            assert getattr(node.value, "id", None) not in constants
        if isinstance(node, ast.Attribute) and node.attr in ("append", "add", "update", "pop", "setdefault", "clear"):
            assert getattr(node.value, "id", None) not in constants


def test_importing_the_package_loads_no_framework_and_changes_nothing():
    program = """
import json, os, sys, torch
before = dict(os.environ)
import normuon_plugins, normuon_plugins.core.build, normuon_plugins.tuning, normuon_plugins.cli
print(json.dumps([sorted(name for name in sys.modules if "." not in name), dict(os.environ) == before]))
"""
    modules, unchanged = json.loads(subprocess.check_output([sys.executable, "-c", program], text=True))
    assert not {*FRAMEWORKS, "matplotlib"} & set(modules)
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


# The one file of each adapter that reads what its framework does not promise to keep.
INTERNALS = {"lightning": "configure.py", "accelerate": "prepare.py", "hf_trainer": "registration.py"}


def private_names(path):
    """Return the underscored names that a file reads of other objects, by attribute or by ``getattr``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) != "self":
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "setattr", "hasattr"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return {name for name in found if isinstance(name, str) and name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("place", INTERNALS)
def test_internals_of_a_framework_are_read_in_one_file(place):
    users = {path.name for path in (PACKAGE / place).glob("*.py") if private_names(path)}
    assert users == {INTERNALS[place]}
