"""Every code block of README and docs runs as printed, and what pages say of names, numbers and messages is so."""

import ast
import inspect
import json
import os
import re
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch
import yaml

import normuon_plugins
from normuon_plugins import NorMuon, plan_parameters
from normuon_plugins.hf_trainer import unregister_normuon
from tests import documentation
from tests.adapters.cpu_start import forget
from tests.adapters.trl_runs import documented_files, documented_names
from tests.models import tiny_llama

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
LANGUAGES = {"python", "bash", "yaml", "json", "text"}  # of which text is what a program printed, or a drawing


@pytest.fixture(autouse=True)
def _as_in_a_new_process():
    """Every page begins and ends as if no other had run: what frameworks keep for the whole process is reset."""
    with mock.patch.dict(os.environ):
        reset()
        yield
        reset()


def reset():
    forget()
    unregister_normuon()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pages_with(language):
    return [page for page in PAGES if any(language == found for found, _ in documentation.blocks(page))]


def page_id(page):
    return page.stem


@pytest.fixture
def one_process_group(tmp_path):
    """A process group of one, for the pages that shard in one process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("sandbox")
    documentation.make_sandbox(folder, ROOT, corpus)
    documented_files(ROOT / "docs" / "trl.md", folder)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_says_what_it_is(page):
    assert {language for language, _ in documentation.blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", [page for page in pages_with("python") if page != README], ids=page_id)
# the examples of a page are short: they name no logger, no workers and no accelerator
@pytest.mark.filterwarnings("ignore::UserWarning")
# trl 1.16 and peft 0.21 call transformers 5.23 by the old names
@pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning")
def test_python_blocks_run_from_top_to_bottom(page, tmp_path, monkeypatch, request):
    if page.stem in ("checkpoints", "distributed", "lightning"):
        request.getfixturevalue("one_process_group")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    namespace = documentation.names()
    if page.stem == "trl":
        namespace |= documented_names(tmp_path / "hub")
    for index, (language, code) in enumerate(documentation.blocks(page)):
        if language == "python":
            exec(compile(code, f"{page.name}, block {index}", "exec"), namespace)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_python_blocks_of_the_readme_run_each_on_its_own(tmp_path, monkeypatch):
    """They are alternatives: each begins with the reader's own model, and those of the frameworks train it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trained = 0
    for index, (language, code) in enumerate(documentation.blocks(README)):
        if language == "python":
            namespace = documentation.names()
            before = namespace["model"].lm_head.weight.detach().clone()
            exec(compile(code, f"README.md, block {index}", "exec"), namespace)
            trained += not before.equal(namespace["model"].lm_head.weight)
    assert trained == 3


@pytest.mark.parametrize("page", pages_with("bash"), ids=page_id)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning")
# lightning 2.6 calls jsonargparse 4.53 by old names
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_commands_run(page, sandbox, monkeypatch):
    monkeypatch.chdir(sandbox)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", sandbox / "cache")
    run = documentation.Runner(ROOT)
    for words in documentation.commands(page):
        run(words)


@pytest.mark.parametrize("page", [*pages_with("yaml"), *pages_with("json")], ids=page_id)
def test_configurations_can_be_read(page):
    for language, code in documentation.blocks(page):
        if language in ("yaml", "json"):
            assert (yaml.safe_load if language == "yaml" else json.loads)(code)


def test_the_printed_plan_is_the_one_in_the_readme():
    def words(text):
        return [line.split() for line in text.splitlines() if not line.startswith("---")]

    (shown,) = [code for _, code in documentation.blocks(README) if code.startswith("parameter ")]
    assert words(shown) == words(str(plan_parameters(tiny_llama())))


def test_set_up_takes_two_commands():
    assert {("make", "demo"), ("make", "test")} <= {tuple(words) for words in documentation.commands(README)}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_no_placeholder_is_left():
    for page in PAGES:
        assert not re.findall(r"@[A-Z]+@", page.read_text()), page


def option_defaults(page):
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.+?) \|", page.read_text(), re.MULTILINE)
    shown = {}
    for listed, defaults in rows:
        values = re.findall(r"`(.+?)`", defaults) or [defaults]
        shown |= dict(zip(re.findall(r"`(\w+)`", listed), values, strict=True))
    return shown


def true_defaults():
    plan = {name: p.default for name, p in inspect.signature(plan_parameters).parameters.items() if name != "model"}
    step = {name: p.default for name, p in inspect.signature(NorMuon).parameters.items() if name != "params"}
    return plan | step


def test_the_page_of_options_lists_every_option_with_its_default():
    shown = option_defaults(ROOT / "docs" / "options.md")
    assert shown.pop("bucket_bytes") == "128 MiB"
    expected = true_defaults()
    assert expected.pop("bucket_bytes") == 128 * 2**20
    assert {name: eval(text) for name, text in shown.items()} == expected


def test_the_options_of_the_readme_have_the_defaults_of_the_code():
    shown = option_defaults(README)
    assert len(shown) > 8
    assert {name: eval(text) for name, text in shown.items()} == {name: true_defaults()[name] for name in shown}


def messages():
    """Return the literal text of every string of the package, what is formatted in left out as an ellipsis."""
    found = []
    for path in Path(normuon_plugins.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        getattr(part, "value", "") if isinstance(part, ast.Constant) else "..." for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(re.sub(r"\{[^}]*\}", "...", text) for text in found)


def test_every_message_of_the_troubleshooting_page_is_one_that_we_print():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    ours = page.partition("## Of the frameworks")[0]
    headings = re.findall(r"^### `(.+)`$", ours, re.MULTILINE)
    assert len(headings) > 10
    known = messages()
    for heading in headings:
        for part in heading.split("..."):
            assert part.strip() in known, part
