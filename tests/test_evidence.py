"""The benchmarks of convergence, transfer and fine-tuning: their arithmetic, and each as a user runs it, on a toy."""

import json
import math
import os
import statistics
import subprocess
import sys

import pytest
import torch
from scipy import stats

from tests.models import tiny_llama


@pytest.fixture(autouse=True)
def modules(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


def execute(root, folder, program, *arguments):
    """Run a benchmark in ``folder``; return what it printed."""
    command = [sys.executable, str(root / "benchmarks" / program), *arguments, "--workers", "1"]
    done = subprocess.run(command, cwd=folder, env={**os.environ}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# tuning ------------------------------------------------------------------------------------------


def search(loss, budget=14, **options):
    """Return the optimum that ``tune`` finds for a function of a point, and all points that it tried."""
    from evidence.tuning import Point, tune

    steps = tune(Point(), budget, **options)
    losses, wanted = {}, next(steps)
    while True:
        losses |= {point: loss(point) for point in wanted}
        assert all(point.exists for point in losses)
        try:
            wanted = steps.send(losses)
        except StopIteration as end:
            return end.value, losses


@pytest.mark.parametrize("optimum", [(0, 0, 1), (5, -4, 3), (-6, 6, 0)])
def test_tuning_extends_the_grid_until_the_optimum_lies_inside(optimum):
    lr, adamw_lr, decay = optimum

    def bowl(point):
        # tilted: the best adamw_lr depends on lr, so that one pass over the knobs is not enough
        tilt = 0.4 * (point.lr - lr)
        return (point.lr - lr) ** 2 + (point.adamw_lr - adamw_lr + tilt) ** 2 + (point.decay - decay) ** 2

    best, tried = search(bowl)
    assert (best.lr, best.adamw_lr, best.decay) == optimum
    assert all(neighbour in tried for neighbour in best.neighbours())


def test_weight_decay_ends_at_zero_and_needs_no_neighbour_below():
    best, tried = search(lambda point: point.decay + abs(point.lr) + abs(point.adamw_lr))
    assert best.decay == 0
    assert all(point.decay >= 0 for point in tried)


def test_every_method_spends_the_same_budget_unless_its_optimum_lies_far():
    near = search(lambda point: point.lr**2 + point.adamw_lr**2 + (point.decay - 1) ** 2)[1]
    assert len(near) == 1 + 6 + 4  # every neighbour and every diagonal: nothing is left to try
    assert len(search(lambda point: (point.lr - 2) ** 2 + point.adamw_lr**2 + point.decay, budget=12)[1]) <= 14


def test_only_the_knobs_that_are_named_are_turned():
    best, tried = search(lambda point: (point.lr - 3) ** 2 + (point.adamw_lr - 3) ** 2, knobs=("lr",))
    assert (best.lr, best.adamw_lr, best.decay) == (3, 0, 1)
    assert len(tried) == 6


def test_what_diverges_is_never_the_optimum():
    best, _ = search(lambda point: math.inf if point.lr > 1 else -point.lr + abs(point.adamw_lr) + point.decay)
    assert best.lr == 1


# intervals and tests -----------------------------------------------------------------------------


def test_intervals_are_students(modules):
    from evidence.intervals import confidence, holm, paired_p, prediction

    values = [3.1, 2.9, 3.4, 3.0, 3.2]
    mean, low, high = confidence(values)
    expected = stats.t.interval(0.95, 4, statistics.fmean(values), stats.sem(values))
    assert (mean, low, high) == pytest.approx((statistics.fmean(values), *expected))
    # the mean of five new ones varies as much again as this mean does: sqrt(2) times as wide
    wide = prediction(values, 5)
    assert (wide.high - wide.low) / (high - low) == pytest.approx(math.sqrt(2))
    assert paired_p([1.0, 2.0, 3.5], [1.1, 2.3, 3.6]) == pytest.approx(
        stats.ttest_1samp([-0.1, -0.3, -0.1], 0.0).pvalue
    )
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_a_prediction_interval_covers_new_seeds_as_often_as_it_says():
    from evidence.intervals import prediction

    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        old, new = torch.randn(5, generator=generator).tolist(), torch.randn(5, generator=generator).mean().item()
        interval = prediction(old, 5)
        covered += interval.low <= new <= interval.high
    assert 0.92 < covered / 400 < 0.98


# the ledger --------------------------------------------------------------------------------------


def a_run(**changes):
    from evidence.training import Run

    options = {
        "text": "t",
        "width": 64,
        "layers": 1,
        "vocabulary": 8,
        "sequence_length": 4,
        "batch_size": 2,
        "steps": 3,
    }
    options |= {"method": "NorMuon", "lr": 0.1, "adamw_lr": 0.1, "weight_decay": 0.0, "seed": 1}
    return Run(**{**options, **changes})


def test_ledger_survives_an_interruption_in_the_middle_of_a_line(tmp_path):
    from evidence.ledger import Ledger

    file = tmp_path / "new" / "results.jsonl"
    ledger = Ledger(file)
    for seed in (1, 2):
        ledger.add(a_run(seed=seed), {"losses": {"3": float(seed)}})
    with file.open("a") as torn:
        torn.write('{"run": {"text"')
    again = Ledger(file)
    assert a_run(seed=1) in again
    assert a_run(seed=2, lr=0.2) not in again
    assert again[a_run(seed=2)] == {"losses": {"3": 2.0}}
    again.add(a_run(seed=3), {"losses": {"3": math.inf}})
    assert len(Ledger(file)) == 3


# what is compared --------------------------------------------------------------------------------


def test_all_methods_train_the_same_hidden_matrices_with_the_hidden_rate():
    from evidence.methods import METHODS, make_optimizer

    hidden, others = set(), set()
    for method in METHODS:
        model = tiny_llama()
        names = {parameter: name for name, parameter in model.named_parameters()}
        optimizer = make_optimizer(model, method, lr=0.5, adamw_lr=0.25, weight_decay=0.125)
        rates = {
            names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
        }
        assert rates.keys() == set(names.values())
        decay = 0.0 if "cautious_decay" in (method.options or {}) else 0.125  # that of a hook, not of the groups
        hidden.add(frozenset(name for name, rate in rates.items() if rate == (0.5, decay)))
        others.add(frozenset(name for name, rate in rates.items() if rate == (0.25, 0.0)))
    assert len(hidden) == len(others) == 1
    assert {name.split(".")[-2] for name in next(iter(hidden))} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_fine_tuning_measures_the_default_options():
    import finetuning
    from evidence.methods import find_method

    from normuon_plugins import NorMuon

    defaults = NorMuon([torch.nn.Parameter(torch.zeros(2, 2))]).defaults
    spelled_out = find_method(finetuning.DEFAULT).options
    assert spelled_out.items() <= defaults.items()


def test_cautious_decay_spares_what_the_step_takes_away_from_zero():
    from evidence.methods import decay_cautiously

    weight = torch.nn.Parameter(torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0]))
    spared = torch.nn.Parameter(torch.tensor([2.0]))
    groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [spared], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    decay_cautiously(optimizer)
    weight.grad, spared.grad = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]), torch.tensor([1.0])
    optimizer.step()
    # towards zero in the first and the fourth: those decay by 0.1 * 0.5 * 2
    torch.testing.assert_close(weight.detach(), torch.tensor([1.8, -2.1, 2.1, -1.8, -0.1]))
    torch.testing.assert_close(spared.detach(), torch.tensor([1.9]))


def test_all_methods_see_the_same_examples_in_the_same_order():
    from evidence.sizes import Size
    from evidence.training import training_examples

    size = Size(width=64, layers=1, vocabulary=8, sequence_length=4, batch_size=2, steps=7)
    tokens = {"training": torch.arange(40, dtype=torch.int32)}
    first, again, other = (training_examples(tokens, size, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # ten blocks: five steps are an epoch, in which every token comes once
    assert first[:5].flatten().sort().values.tolist() == list(range(40))


def test_a_run_that_diverges_ends_and_is_infinite():
    from evidence.training import fit

    model = tiny_llama()
    batches = torch.randint(0, 64, (6, 2, 8), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    losses = fit(model, optimizer, batches, batches[0], evaluations=2, precision="float32")["losses"]
    assert losses.keys() == {"3", "6"}
    assert math.isinf(losses["6"])


def test_documentation_holds_every_paragraph_once():
    from evidence.texts import NAMED

    paragraphs = [part for document in NAMED["documentation"]() for part in document.split("\n\n")]
    assert len(paragraphs) > 1000
    assert len({part.strip() for part in paragraphs}) == len(paragraphs)


# the programs ------------------------------------------------------------------------------------

DEFAULT = "NorMuon, Nesterov"
COMPARED = ["--size", "tiny", "--only", "^AdamW$|^NorMuon, Nesterov$", "--seeds", "1", "2", "3", "--budget", "1"]
COMPARED += ["--no-timing", "--results", "runs.jsonl", "--out", "out"]


@pytest.fixture(scope="module")
def compared(root, corpus, tmp_path_factory):
    """The folder of a comparison of two methods on a toy, and what it printed."""
    folder = tmp_path_factory.mktemp("convergence")
    return folder, execute(root, folder, "convergence.py", "--text", str(corpus), *COMPARED)


def test_table_says_what_the_runs_found(compared):
    folder, printed = compared
    found = json.loads(next((folder / "out").glob("convergence-*.json")).read_text())
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    for name, row in found["summary"]["methods"].items():
        settings = row["settings"]
        final = [
            each["result"]["losses"]["24"]
            for each in runs
            if each["run"]["method"] == name
            and each["run"]["seed"] in (1, 2, 3)
            and all(each["run"][key] == settings[key] for key in ("lr", "adamw_lr", "weight_decay"))
        ]
        assert sorted(row["losses"]) == sorted(final)
        assert f"{statistics.fmean(final):.4f} [" in printed
    differences = [
        a - b for a, b in zip(*(found["summary"]["methods"][n]["losses"] for n in (DEFAULT, "AdamW")), strict=True)
    ]
    row = found["summary"]["differences"]["AdamW"][DEFAULT]
    assert row["difference"][0] == pytest.approx(statistics.fmean(differences))
    assert row["better"] == sum(difference < 0 for difference in differences)


def test_optimum_lies_inside_what_was_tried(compared):
    folder, _ = compared
    found = json.loads(next((folder / "out").glob("convergence-*.json")).read_text())
    for method in found["methods"].values():
        for knob in ("lr", "adamw_lr"):
            values = {run[knob] for run in method["tried"]}
            assert min(values) < method["settings"][knob] < max(values)


def test_files_are_written(compared):
    folder, _ = compared
    suffixes = sorted(path.suffix for path in (folder / "out").iterdir())
    assert suffixes == [".json", ".json", ".md", ".png", ".png"]


def test_a_second_call_repeats_nothing_and_more_seeds_are_added(root, corpus, compared):
    folder, printed = compared
    before = (folder / "runs.jsonl").read_text()
    assert execute(root, folder, "convergence.py", "--text", str(corpus), *COMPARED) == printed
    assert (folder / "runs.jsonl").read_text() == before
    more = [word if word != "3" else "4" for word in COMPARED]
    execute(root, folder, "convergence.py", "--text", str(corpus), *more)
    added = (folder / "runs.jsonl").read_text().removeprefix(before).splitlines()
    assert [json.loads(line)["run"]["seed"] for line in added] == [4, 4]


def test_tuned_rates_are_taken_on_another_text(root, compared, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.md").write_text(" ".join(str(number * place) for place in range(200)))
    tuned = ["--tuned", str(compared[0] / "out" / "tuned-tiny.json")]
    printed = execute(root, tmp_path, "convergence.py", "--text", "text", *tuned, *without(COMPARED, "--budget"))
    assert "steps to AdamW's final loss" in printed
    runs = [json.loads(line)["run"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    rates = json.loads((compared[0] / "out" / "tuned-tiny.json").read_text())["methods"]
    assert len(runs) == 6
    assert all(run[key] == rates[run["method"]][key] for run in runs for key in ("lr", "adamw_lr", "weight_decay"))


def without(words, option):
    """Return a command line without an option and its value."""
    place = words.index(option)
    return words[:place] + words[place + 2 :]


def test_transfer_follows_the_optimum_at_every_width(root, corpus, tmp_path):
    words = [
        "--widths",
        "64",
        "128",
        "--steps",
        "10",
        "--vocabulary",
        "300",
        "--seeds",
        "1",
        "--results",
        "runs.jsonl",
        "--out",
        "out",
    ]
    printed = execute(root, tmp_path, "transfer.py", "--text", str(corpus), *words)
    assert "| exponent of the width |" in printed
    found = json.loads((tmp_path / "out" / "transfer.json").read_text())["valleys"]
    for valleys in found.values():
        assert [valley["width"] for valley in valleys] == [64, 128]
        for valley in valleys:
            losses = {float(rate): statistics.fmean(values) for rate, values in valley["losses"].items()}
            assert min(losses) < min(losses, key=losses.get) < max(losses)
    assert (tmp_path / "out" / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_parabola_finds_its_bottom():
    from transfer import Valley

    rates = (2**-7, 2**-6, 2**-5, 2**-4)
    valley = Valley("NorMuon", 64, {rate: [(math.log2(rate) + bottom) ** 2 for bottom in (5.3, 4.9)] for rate in rates})
    assert math.log2(valley.best()) == pytest.approx(-5.1)
    assert [math.log2(valley.best(seed)) for seed in (0, 1)] == pytest.approx([-5.3, -4.9])


def test_finetuning_compares_every_arm_on_every_pretrained_model(root, corpus, compared, tmp_path):
    words = ["--tuned", str(compared[0] / "out" / "tuned-tiny.json"), "--size", "tiny", "--pretraining-steps", "4"]
    words += ["--steps", "3", "--seeds", "1", "2", "--results", "runs.jsonl", "--out", "out"]
    words += ["--pretraining-text", str(corpus), "--text", str(corpus)]
    printed = execute(root, tmp_path, "finetuning.py", *words)
    found = json.loads((tmp_path / "out" / "finetuning.json").read_text())["arms"]
    assert len(found) == 2 * 5
    for row in found:
        assert f"| {row['pretrained']} | {row['arm']} | {row['lr']:g} |" in printed
        assert all(run["new"] != run["new_before"] for run in row["runs"])
        rates = [float(rate) for rate in row["tried"]]
        assert min(rates) < row["lr"] < max(rates)
    trained = {row["arm"]: row["runs"][0]["trained"] for row in found}
    assert trained["LoRA, b"] == trained["LoRA, adamw"] < trained["AdamW"] == trained[DEFAULT]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nobody"], "'nobody' names none of"),
        (["--seeds", "0", "1"], "seed 0 is the tuning's"),
        (["--seeds", "1"], "at least two different numbers"),
        (["--steps", "2"], "--steps at 10"),
        (["--tuned", "nowhere.json"], "nowhere.json: no such file"),
    ],
)
def test_impossible_arguments_end_with_a_message(arguments, message, capsys):
    from convergence import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_text_that_cannot_be_divided_ends_with_a_message(root, tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "one.md").write_text("one paragraph")
    command = [sys.executable, str(root / "benchmarks" / "convergence.py"), "--size", "tiny", "--text", "few"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "--text few: 1 documents cannot be divided" in done.stderr
    assert "Traceback" not in done.stderr


def test_large_model_without_a_gpu_says_that_it_is_skipped(root, tmp_path):
    assert "skipped: 124 million parameters need a GPU" in execute(root, tmp_path, "convergence.py", "--size", "124m")


# the page ----------------------------------------------------------------------------------------


def page_lines(root):
    return set((root / "docs" / "evidence_details.md").read_text().splitlines())


def assert_on_page(root, table):
    missing = [line for line in table.splitlines() if line.startswith("|") and line not in page_lines(root)]
    assert not missing


# In the order of the page.
TEXTS = ["python", "documentation", "headers", "manual", "changelogs", "perl"]


def published(root):
    return sorted((root / "docs" / "evidence").glob("convergence-*.json"))


def test_tables_of_comparisons_on_the_page_are_those_of_the_results(root):
    from across import read
    from evidence.report import markdown, summarize

    comparisons = [each for each in map(read, published(root)) if each.text in TEXTS[:2]]
    assert len(comparisons) >= 3
    for comparison in comparisons:
        assert_on_page(root, markdown(comparison, summarize(comparison)))


def test_other_tables_on_the_page_are_those_of_the_results(root):
    import finetuning
    import transfer

    record = json.loads((root / "docs" / "evidence" / "transfer.json").read_text())
    valleys = {
        name: [
            transfer.Valley(each["method"], each["width"], {float(k): v for k, v in each["losses"].items()})
            for each in several
        ]
        for name, several in record["valleys"].items()
    }
    assert_on_page(root, transfer.markdown(valleys, record["seeds"]))
    record = json.loads((root / "docs" / "evidence" / "finetuning.json").read_text())
    assert_on_page(root, finetuning.markdown(record["arms"], record["seeds"]))


def test_tables_of_rates_on_the_first_page_are_those_of_the_results(root):
    from evidence.rate_report import markdown
    from rates import read

    lines = set((root / "docs" / "evidence.md").read_text().splitlines())
    files = sorted((root / "docs" / "evidence").glob("rates-*.json"))
    assert len(files) >= 4
    for file in files:
        for comparison in read(file):
            missing = [line for line in markdown(comparison).splitlines() if line and line not in lines]
            assert not missing, file


def test_the_table_of_regimes_is_that_of_the_results(root):
    from regimes import markdown

    record = json.loads((root / "docs" / "evidence" / "regimes.json").read_text())
    lines = set((root / "docs" / "evidence.md").read_text().splitlines())
    assert {line for line in markdown(record["regimes"]).splitlines() if line} <= lines


def test_published_rates_are_the_optima_of_the_published_tuning(root):
    for file in published(root):
        record = json.loads(file.read_text())
        for name, method in record["methods"].items():
            if method["tried"]:
                best = min(method["tried"], key=lambda run: run["loss"])
                assert all(best[key] == method["settings"][key] for key in ("lr", "adamw_lr", "weight_decay")), name


def test_interval_of_another_text_is_made_of_the_means_of_texts(root):
    from across import markdown, read
    from evidence.intervals import prediction

    comparisons = [read(file) for file in published(root) if file.name.startswith("convergence-2m-")]
    means = [statistics.fmean(each.differences("NorMuon", "AdamW")) for each in comparisons]
    low, high = prediction(means, 1)[1:]
    table = markdown(comparisons, comparisons[:1])
    (line,) = [line for line in table.splitlines() if line.startswith("| NorMuon: loss minus AdamW's")]
    assert f"{low:+.4f} to {high:+.4f}" in line
    assert f"{means[0]:+.4f}, {'yes' if low <= means[0] <= high else 'no'} |" in line
    assert_on_page(root, markdown(sorted(comparisons, key=lambda each: TEXTS.index(each.text))))


# the orthogonalizers of the examples -------------------------------------------------------------


def test_row_and_column_scaling_balances():
    from orthogonalizers.reg import row_and_column_scaling

    matrices = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 8)[:, None]
    matrices[1, 3] = 0.0
    scaled = row_and_column_scaling(matrices)
    assert (scaled.norm(dim=-2) - 1).abs().max() < 1e-5
    assert not scaled[1, 3].any()
    expected = matrices[0] / matrices[0].norm(dim=1, keepdim=True)
    torch.testing.assert_close(scaled[0], expected / expected.norm(dim=0, keepdim=True))
    assert row_and_column_scaling(matrices.bfloat16()).dtype == torch.bfloat16


def test_cosh_rms_scaling_divides_by_one_number():
    from orthogonalizers.auon import cosh_rms_scaling

    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)) * 1e-3
    unit = matrix / matrix.norm()
    expected = unit / torch.sqrt((torch.cosh(unit) ** 2).mean())
    torch.testing.assert_close(cosh_rms_scaling(matrix[None])[0], expected)
    assert not cosh_rms_scaling(torch.zeros(1, 3, 3)).any()


@pytest.mark.parametrize("name", ["reg", "auon"])
def test_examples_of_orthogonalizers_train(name):
    from evidence.methods import ORTHOGONALIZERS

    from normuon_plugins import NorMuon

    weight = torch.nn.Parameter(torch.zeros(6, 4))
    target = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    optimizer = NorMuon(
        [weight], lr=0.05, weight_decay=0.0, normalize_neurons=False, orthogonalize_fn=ORTHOGONALIZERS[name]
    )
    losses = []
    for _ in range(60):
        loss = (weight - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
