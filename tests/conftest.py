"""Fixtures and settings of all tests."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # for the tests of the examples' own functions

# No test reaches a hub, and none finds a GPU that another machine would not have.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
torch.set_num_threads(1)


# Of two workers that take file by file, neither should begin a long one when the other has nothing left to do.
LONG_ONES_FIRST = ("test_examples", "test_architectures", "distributed", "adapters")


def pytest_collection_modifyitems(items):
    """Move the files that take longest to the front; within a file, and among the others, the order stays."""

    def place(item):
        return next((n for n, words in enumerate(LONG_ONES_FIRST) if words in str(item.path)), len(LONG_ONES_FIRST))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root():
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of forty small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        words = [f"word{(number * 7 + place * place) % 50}" for place in range(80)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder
