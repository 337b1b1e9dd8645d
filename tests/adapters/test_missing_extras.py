"""Without a framework, its adapter says which extra to install."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("adapter", "package", "extra"),
    [
        ("lightning", "lightning", "lightning"),
        ("accelerate", "accelerate", "accelerate"),
        ("hf_trainer", "transformers", "hf"),
    ],
)
def test_missing_extra_names_the_command(adapter, package, extra):
    # a finder that knows nothing of the package, as on a machine without it
    program = f"""
import sys
from importlib.machinery import PathFinder

class WithoutPackage(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == {package!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutPackage
import normuon_plugins
import normuon_plugins.{adapter}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert f'{package} is not installed; run: pip install "normuon-plugins[{extra}]"' in done.stderr
