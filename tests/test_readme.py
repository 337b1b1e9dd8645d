"""The README and the pages in docs are true: code runs, commands exist, tables are printed."""

import inspect
import re

import pytest
import torch
from torch.utils.data import DataLoader

from normuon_plugins import NorMuon, plan_parameters
from tests.models import tiny_llama, token_blocks


def blocks(root, language, page="README.md"):
    fences = (root / page).read_text().split("\n```")[1:]  # what stands inside a fence, then what follows it, ...
    return [block.partition("\n")[2] + "\n" for block in fences[::2] if block.partition("\n")[0] == language]


@pytest.mark.parametrize("index", range(5))
# the examples of the README are short: they name no logger, no workers and no accelerator
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_python_blocks_run_as_printed(root, tmp_path, monkeypatch, index):
    code = blocks(root, "python")
    assert len(code) == 5
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    dataset = token_blocks(8)
    names = {"model": tiny_llama(), "dataset": dataset, "loader": DataLoader(dataset, 4)}
    before = names["model"].lm_head.weight.detach().clone()
    exec(compile(code[index], f"README.md, python block {index}", "exec"), names)
    if "optimizer" in names:
        assert isinstance(getattr(names["optimizer"], "optimizer", names["optimizer"]), NorMuon)
    if "plan_parameters" not in code[index]:  # all but the plain blocks train
        assert not before.equal(names["model"].lm_head.weight)


@pytest.mark.parametrize("index", range(2))
def test_python_blocks_of_the_distributed_page_run_as_printed(root, tmp_path, index):
    code = blocks(root, "python", "docs/distributed.md")
    assert len(code) == 2
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        exec(compile(code[index], f"docs/distributed.md, python block {index}", "exec"), {"model": tiny_llama()})
    finally:
        torch.distributed.destroy_process_group()


def test_the_printed_plan_is_the_one_in_the_readme(root):
    def words(text):
        return [line.split() for line in text.splitlines() if not line.startswith("---")]

    (shown,) = [block for block in blocks(root, "") if block.startswith("parameter ")]
    assert words(shown) == words(str(plan_parameters(tiny_llama())))


def test_set_up_commands_are_targets_of_the_makefile(root):
    targets = set(re.findall(r"^([a-z]+):", (root / "Makefile").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"^make ([a-z]+)", "\n".join(blocks(root, "")), re.MULTILINE))
    assert {"demo", "test"} <= mentioned <= targets


def test_no_placeholder_is_left(root):
    assert not re.findall(r"@[A-Z]+@", (root / "README.md").read_text())


def test_links_lead_somewhere(root):
    for page in [root / "README.md", *root.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_option_table_lists_every_option_with_its_default(root):
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", (root / "README.md").read_text(), re.MULTILINE)
    shown = {}
    for names, defaults in rows:
        listed = re.findall(r"`(\w+)`", names)
        values = re.findall(r"`(.+?)`", defaults) or [defaults]
        shown |= dict(zip(listed, values, strict=True))
    assert shown.pop("bucket_bytes") == "128 MiB"
    plan = {name: p.default for name, p in inspect.signature(plan_parameters).parameters.items() if name != "model"}
    assert {name: eval(shown.pop(name)) for name in plan} == plan
    parameters = inspect.signature(NorMuon).parameters
    assert parameters["bucket_bytes"].default == 128 * 2**20
    expected = {name: p.default for name, p in parameters.items() if name not in ("params", "bucket_bytes")}
    assert {name: eval(text) for name, text in shown.items()} == expected
