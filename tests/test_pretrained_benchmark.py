"""Fine-tuning of pretrained models as a benchmark: its tasks, its protocol and its tables, on a tiny random encoder."""

import json
import math
from dataclasses import replace

import numpy
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

TEXTS = ("library", "tokens", "docstrings", "pairs", "masked")
SOURCE = """\
class Point:
    def move(self, by=2):  # where
        return by + self.shape(x=1, y=by == 2) + "a\\nb"
"""


@pytest.fixture(autouse=True)
def modules(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a tiny BERT with random weights, whose word pieces are letters."""
    folder = tmp_path_factory.mktemp("encoder")
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*special.values(), *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(word, vocabulary.index(word)) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def find(name):
    from evidence.adaptation import find_task

    return find_task(name)


# tasks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TEXTS, "pitch"])
def test_tasks_are_divided_the_same_each_time_and_share_no_text(name):
    division, again = (find(name).divide(80, 16) for _ in range(2))
    assert division == again
    assert [len(side) for side in division] == [80, 16]
    texts = [example[0] for side in division for example in side]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", ["library", "docstrings"])
def test_classes_are_as_large_as_each_other(name):
    task = find(name)
    for side, count in zip(task.divide(80, 16), (10, 2), strict=True):
        assert [sum(label == each for _, label in side) for each in range(task.classes)] == [count] * task.classes


def test_a_class_without_texts_is_an_error():
    from evidence.labelled_texts import divide

    with pytest.raises(ValueError, match="too few such texts"):
        divide([[[("a", 0), ("b", 0)]], [[("a", 1)]]], 1, 1)


def test_every_character_of_source_has_its_kind():
    from evidence.labelled_texts import KINDS, NO_KIND, character_kinds

    lines = SOURCE.split("\n")
    kinds = character_kinds(SOURCE)
    assert [len(line) for line in kinds] == [len(line) for line in lines]

    def kind_of(row, word):
        at = lines[row].index(word)
        (found,) = {kinds[row][place] for place in range(at, at + len(word))}
        return "nothing" if found == NO_KIND else KINDS[found]

    expected = [(0, "class", "keyword"), (0, "Point", "definition"), (1, "move", "definition"), (1, "self", "name")]
    expected += [(1, "by", "argument"), (1, "2", "number"), (1, "# where", "comment"), (1, "    ", "nothing")]
    expected += [(2, "self", "name"), (2, "shape", "attribute"), (2, "x", "argument"), (2, "==", "operator")]
    expected += [(2, '"a\\nb"', "string"), (2, "return", "keyword")]
    assert [(row, word, kind_of(row, word)) for row, word, _ in expected] == expected


def test_a_word_piece_is_of_the_kind_of_its_first_character(encoder):
    from evidence.encoding import IGNORED, encode
    from evidence.pretrained_models import make_tokenizer

    found = encode(find("tokens"), make_tokenizer(str(encoder)), [("ab +c", [5, 5, -1, 9, 3])])
    assert found["labels"][0, :6].tolist() == [IGNORED, 5, 5, 9, 3, IGNORED]
    assert set(found["labels"][0, 6:].tolist()) == {IGNORED}


def test_a_hidden_word_is_the_label_and_the_rest_stays(encoder):
    from evidence.encoding import IGNORED, encode
    from evidence.pretrained_models import make_tokenizer

    task, tokenizer = find("masked"), make_tokenizer(str(encoder))
    examples = [(f"{number} words of some text, and more of it",) for number in range(400)]
    found, whole = (
        encode(task, tokenizer, examples),
        encode(replace(task, kind="pairs"), tokenizer, [(*e, "x") for e in examples]),
    )
    chosen = found["labels"] != IGNORED
    assert torch.equal(found["labels"][chosen], whole["input_ids"][chosen])
    assert torch.equal(found["input_ids"][~chosen], whole["input_ids"][~chosen])
    assert not chosen[whole["input_mask"] == 0].any()
    words = (whole["input_mask"].sum() - 2 * len(examples)).item()
    assert chosen.sum().item() / words == pytest.approx(0.15, abs=0.01)
    shown = found["input_ids"][chosen]
    assert (shown == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.04)


# the protocol ------------------------------------------------------------------------------------


def drive(task, loss, ledger=None):
    """Carry out a ``Task`` with a function of a run in place of training; return its result and all runs."""
    ledger = {} if ledger is None else ledger
    try:
        while True:
            for run in next(task):
                ledger[run] = {"loss": loss(run), "accuracy": 0.5}
    except StopIteration as end:
        return end.value, ledger


def a_run(**changes):
    from evidence.adaptation import Adaptation

    run = Adaptation("data", "minilm", "library", False, "AdamW", 4e-4, 3, 0, "float32")
    return replace(run, **changes)


def bowl(optimum, height=1.0):
    """Return a loss whose mean over seeds is smallest at a learning rate; a single seed's may not be."""
    return lambda run: height + math.log2(run.lr / optimum) ** 2 + {1: 0.9, 2: -0.9}[run.seed] * math.log2(run.lr)


@pytest.mark.parametrize("places", [0, 5, -4])
def test_the_search_ends_between_worse_neighbours(places):
    from evidence.rate_search import best_place, search

    ledger = {}
    results, _ = drive(search(a_run(), (-1, 0, 1), (1, 2), ledger), bowl(4e-4 * 2.0**places), ledger)
    assert best_place(results) == places
    assert {places - 1, places + 1} <= set(results)
    assert list(results) == list(range(min(places, 0) - 1, max(places, 0) + 2))


def test_a_rate_where_one_seed_diverges_is_no_optimum():
    from evidence.rate_search import best_place, search

    ledger = {}
    diverges = lambda run: math.inf if run.lr > 4e-4 and run.seed == 2 else -run.lr  # noqa: E731
    results, _ = drive(search(a_run(), (-1, 0, 1), (1, 2), ledger), diverges, ledger)
    assert best_place(results) == 0


def test_methods_are_run_at_adamws_optimum_and_beside_it_and_followed_to_their_own():
    from evidence.rate_search import compare

    ledger = {}
    loss = lambda run: bowl(1.6e-3 if run.method == "AdamW" else 1e-4)(run)  # noqa: E731
    theirs, _ = drive(compare(a_run(), "AdamW", (1, 2), ledger), loss, ledger)
    assert theirs["lr"] == pytest.approx(1.6e-3)
    before = dict(ledger)
    ours, _ = drive(compare(a_run(), "NorMuon", (1, 2), ledger), loss, ledger)
    assert ours["lr"] == pytest.approx(1e-4)
    rates = [rate["lr"] for rate in ours["rates"]]
    assert rates == pytest.approx([4e-4 * 2.0**place for place in range(-3, 4)])
    assert {run.method for run in ledger.keys() - before.keys()} == {"NorMuon"}
    assert [rate["loss"] for rate in ours["rates"]] == [
        [ledger[a_run(method="NorMuon", lr=lr, seed=seed)]["loss"] for seed in (1, 2)] for lr in rates
    ]


# the report --------------------------------------------------------------------------------------


def fabricated():
    """A comparison of two methods with losses from nowhere, and these losses: method, rate, seed."""
    from evidence.rate_report import Comparison

    losses = numpy.random.default_rng(0).normal(1.0, 0.1, (2, 4, 3))
    losses[:, :, :] += numpy.array([[0.5, 0.0, 0.5, 0.9], [0.4, 0.2, 0.0, 0.3]])[:, :, None]
    rates = [2e-4, 4e-4, 8e-4, 1.6e-3]
    methods = [
        {
            "method": method,
            "lr": best,
            "rates": [{"lr": lr, "loss": row.tolist()} for lr, row in zip(rates, losses[place], strict=True)],
        }
        for place, (method, best) in enumerate([("AdamW", 4e-4), ("NorMuon", 8e-4)])
    ]
    return Comparison("minilm", "library", "which", False, 150, (1, 2, 3), methods), losses


def test_table_has_the_numbers_of_numpy():
    from evidence.rate_report import markdown, summarize

    comparison, (theirs, ours) = fabricated()
    row = summarize(comparison)[1]
    table = markdown(comparison)
    cases = {"half": (ours[0], theirs[0]), "same": (ours[1], theirs[1]), "twice": (ours[2], theirs[2])}
    for name, (one, other) in {**cases, "own best": (ours[2], theirs[1])}.items():
        mean, error = numpy.mean(one - other), stats.sem(one - other)
        assert row[name]["difference"] == pytest.approx((mean, *stats.t.interval(0.95, 2, mean, error)))
        assert row[name]["p"] == pytest.approx(stats.ttest_rel(one, other).pvalue)
        assert row[name]["better"] == numpy.sum(one < other)
        assert f"{mean:+.3f} [" in table
    assert row["loss"].mean == pytest.approx(ours[2].mean())
    assert "AdamW's best rate is 0.0004" in table
    assert f"| 0.0008 | {ours[2].mean():.3f} [" in table


def test_files_hold_every_loss_and_a_picture(tmp_path):
    from evidence.rate_report import write_report

    comparison, losses = fabricated()
    files = write_report([comparison] * 2, {"command": "this"}, tmp_path / "out", "name")
    record = json.loads(files[1].read_text())
    assert [[rate["loss"] for rate in each["rates"]] for each in record["comparisons"][1]["methods"]] == losses.tolist()
    assert files[2].read_bytes().startswith(b"\x89PNG")


# the runs ----------------------------------------------------------------------------------------


# peft 0.21 asks transformers 5.23 by the old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_every_task_is_learned_from_under_every_method(name, lora, encoder, tmp_path):
    from evidence.adaptation import adapt
    from evidence.encoding import encoded
    from evidence.one_rate import LORA_METHODS, METHODS

    data = encoded(str(encoder), find(name), tmp_path, 64, 32)
    run = a_run(data=data.name, model=str(encoder), task=name, lora=lora, lr=1e-2, seed=1)
    results = [adapt(replace(run, method=method), tmp_path) for method in (LORA_METHODS if lora else METHODS)]
    assert all(math.isfinite(result["loss"]) and 0 <= result["accuracy"] <= 1 for result in results)
    assert len({result["trained"] for result in results}) == 1
    again = adapt(run, tmp_path)
    assert again["loss"] == results[0]["loss"]


def test_the_pitch_of_tones_is_learned_by_convolutions(tmp_path, monkeypatch):
    from evidence.adaptation import adapt
    from evidence.crepe import Crepe
    from evidence.encoding import encoded

    torch.save(Crepe().state_dict(), tmp_path / "tiny.pth")
    for module in ("encoding", "pretrained_models"):
        monkeypatch.setattr(f"evidence.{module}.model_path", lambda name: tmp_path / "tiny.pth")
    data = encoded("crepe", find("pitch"), tmp_path, 32, 16)
    run = a_run(data=data.name, model="crepe", task="pitch", seed=1)
    results = [adapt(replace(run, method=method), tmp_path) for method in ("AdamW", "NorMuon")]
    assert all(math.isfinite(result["loss"]) for result in results)
    assert {result["trained"] for result in results} == {486_552}


def test_a_tone_has_the_pitch_it_is_labelled_with():
    from evidence.tones import CENTS_PER_BIN, FIRST_CENTS, FRAME, SAMPLE_RATE, tone

    for pitch in (100, 150, 200):
        frequency = 10 * 2 ** ((FIRST_CENTS + CENTS_PER_BIN * pitch) / 1200)
        power = sum(torch.fft.rfft(tone(str(number), pitch)).abs().square() for number in range(20))
        bands = torch.arange(len(power)) * SAMPLE_RATE / FRAME / frequency
        partials = (bands - bands.round()).abs() < 0.15
        assert power[partials & (bands > 1.5) & (bands < 11.5)].sum() / power.sum() > 0.4
        assert power[bands < 1.5].sum() / power.sum() < 0.05


def test_heads_order_and_dropout_depend_on_the_seed_alone(encoder):
    from evidence.adaptation import order_of_examples
    from evidence.pretrained_models import make_model

    heads = [make_model(str(encoder), find("library"), seed).classifier.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    order = order_of_examples(10, 4, 5, seed=1)
    assert torch.equal(order, order_of_examples(10, 4, 5, seed=1))
    assert sorted(order.flatten()[:10].tolist()) == sorted(order.flatten()[10:].tolist()) == list(range(10))


def test_one_rate_and_one_decay_serve_all_methods(encoder):
    from evidence.one_rate import DECAY, METHODS, TWICE, make_optimizer
    from evidence.pretrained_models import make_model

    model = make_model(str(encoder), find("library"), 1)
    for method in METHODS:
        groups = make_optimizer(model, method, 3e-4).param_groups
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert {group["lr"] for group in groups} == ({3e-4, 6e-4} if method == TWICE else {3e-4})
        assert all(decays[id(p)] == (DECAY if p.ndim > 1 else 0.0) for p in model.parameters())


class SerialPool:
    """``Pool`` without processes."""

    def __init__(self, work, ledger, cache, workers):
        self.work, self.ledger, self.cache = work, ledger, cache

    def carry_out(self, tasks, description, expected):
        return [self.finish(task) for task in tasks]

    def finish(self, task):
        try:
            while True:
                for run in next(task):
                    if run not in self.ledger:
                        self.ledger.add(run, self.work(run, self.cache))
        except StopIteration as end:
            return end.value

    def close(self):
        pass


def test_benchmark_from_the_command_line_to_the_picture(encoder, tmp_path, monkeypatch, capsys):
    import pretrained

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evidence.rate_program.Pool", SerialPool)
    few = lambda model, task, cache: few.encoded(model, task, cache, 64, 32)  # noqa: E731
    few.encoded = pretrained.encoded
    monkeypatch.setattr(pretrained, "encoded", few)
    words = ["--models", str(encoder), "absent", "--tasks", "library", "--steps", "3", "--seeds", "1", "2"]
    words += ["--results", "runs.jsonl", "--out", "out"]
    pretrained.main(words)
    printed = capsys.readouterr().out
    assert "skipped absent, library: absent is no folder" in printed.replace("\n", " ")
    assert "| NorMuon, fixed size |" in printed
    found = json.loads((tmp_path / "out" / "pretrained.json").read_text())["comparisons"][0]
    assert {each["method"] for each in found["methods"]} == {"AdamW", "NorMuon, fixed size", "NorMuon"}
    for each in found["methods"]:
        rates = [rate["lr"] for rate in each["rates"]]
        assert min(rates) < each["lr"] < max(rates)
    before = (tmp_path / "runs.jsonl").read_text()
    pretrained.main(words)
    assert (tmp_path / "runs.jsonl").read_text() == before


def test_a_package_that_is_missing_is_named():
    from evidence.pretrained_models import MODELS, MissingModel, PretrainedModel, model_path

    absent = PretrainedModel("none", "no-such-package", "no_such_package", "model", "pip install no-such-package")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evidence.pretrained_models.MODELS", (*MODELS, absent))
        with pytest.raises(MissingModel, match="pip install no-such-package"):
            model_path("none")


def test_a_task_is_for_the_models_that_can_take_it():
    from evidence.pretrained_models import fits

    assert [fits(model, find(task)) for model in ("minilm", "crepe") for task in ("library", "pitch")] == [
        True,
        False,
        False,
        True,
    ]


# regimes -----------------------------------------------------------------------------------------


def test_an_update_is_described_as_adamw_takes_it():
    from evidence.update_shape import watch_updates

    weight = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = torch.optim.AdamW([weight], lr=0.5, betas=(0.9, 0.99), weight_decay=0.0)
    records = watch_updates(optimizer, {"weight": weight}, [2])
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn(6, 4)
        optimizer.step()
        if len(records) == 1 and "change" not in records[0]:
            records[0]["change"] = (weight - before).square().mean().sqrt().item()
    assert [record["step"] for record in records] == [2]
    assert records[0]["rms"] == pytest.approx(records[0]["change"] / 0.5, rel=1e-4)


def test_a_constant_gradient_of_full_rank_asks_for_an_rms_of_one():
    """``M / sqrt(v)`` is orthogonal already, with an RMS of 1: five times 0.2."""
    from evidence.update_shape import watch_updates

    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.AdamW([weight])
    records = watch_updates(optimizer, {"weight": weight}, [1, 2])
    gradient = torch.linalg.qr(torch.randn(8, 8)).Q
    for _ in range(2):
        weight.grad = gradient.clone()
        optimizer.step()
    for record in records:
        assert record["effective_rank"] == pytest.approx(1, rel=1e-4)
        assert record["factor"] == pytest.approx(5, rel=1e-4)


def test_regimes_are_summed_up_by_deciles(tmp_path):
    from regimes import draw, markdown, spread

    values = numpy.random.default_rng(0).uniform(0.1, 1, (3, 40))
    records = [
        {"step": step, "matrix": str(place), "rms": value, "effective_rank": value / 2, "factor": 3 * value}
        for step, row in zip((1, 10, 20), values, strict=True)
        for place, value in enumerate(row.tolist())
    ]
    for row, found in zip(values, spread(records, "rms").values(), strict=True):
        assert found == pytest.approx(numpy.quantile(row, (0.1, 0.5, 0.9)))
    assert f"| fine-tuning | the first | {numpy.median(values[0]):.2g} [" in markdown({"fine-tuning": records})
    draw({"pretraining": records, "fine-tuning": records}, tmp_path / "regimes.png")
    assert (tmp_path / "regimes.png").stat().st_size > 0
