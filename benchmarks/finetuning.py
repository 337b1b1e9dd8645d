"""Fine-tune what AdamW and NorMuon pretrained, with each of them and with LoRA under the three policies.

python benchmarks/finetuning.py --tuned docs/evidence/tuned-2m.json

The model is pretrained on one text and fine-tuned on another, with the first one's tokenizer. One learning rate
serves all trained parameters of an arm, tuned for it on powers of two; then several seeds, each with a pretrained model
of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from convergence import TUNING_SEED, base_run, default_workers
from evidence.intervals import confidence, paired_p
from evidence.ledger import Ledger
from evidence.methods import find_method, make_optimizer
from evidence.pool import Pool, Task
from evidence.sizes import SIZES
from evidence.texts import tokenized, tokenized_by
from evidence.training import (
    RATES,
    Run,
    decoder,
    evaluate,
    fit,
    load_tokens,
    pick_device,
    train_model,
    training_examples,
    validation_examples,
)
from peft import LoraConfig, get_peft_model
from rich.console import Console

# What build_normuon() gives to who says nothing else, spelled out in ``methods``.
DEFAULT = "NorMuon, Nesterov"
# name -> method, policy of build_normuon(lora=...) (None: all weights are trained), first learning rate to try
ARMS = {
    "AdamW": ("AdamW", None, 1e-3),
    DEFAULT: (DEFAULT, None, 4e-3),
    "LoRA, adamw": (DEFAULT, "adamw", 4e-3),
    "LoRA, normuon": (DEFAULT, "normuon", 4e-3),
    "LoRA, b": (DEFAULT, "b", 4e-3),
}
PRETRAINED = ("AdamW", DEFAULT)
# Hu et al., https://arxiv.org/abs/2106.09685, find ranks of 4 to 8 enough; alpha twice the rank is peft's custom.
RANK, ALPHA = 8, 16
FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class FineTuning:
    """Everything that decides the result of fine-tuning.

    Attributes:
        pretraining: The run that made the model.
        text: Name of the file of tokens.
        arm: One of ``ARMS``.
        lr: Peak learning rate of all that is trained.
        steps: Optimizer steps.
        seed: Of the order of the examples and of the LoRA factors.
    """

    pretraining: Run
    text: str
    arm: str
    lr: float
    steps: int
    seed: int


def work(run: Run | FineTuning, cache: Path) -> dict[str, Any]:
    """Carry out one run; a pretrained model is kept in ``cache``."""
    return pretrain(run, cache) if isinstance(run, Run) else finetune(run, cache)


def weights_file(run: Run, cache: Path) -> Path:
    """Return where the model of a pretraining run is kept."""
    digest = hashlib.sha256(json.dumps(asdict(run), sort_keys=True).encode()).hexdigest()
    return cache / f"weights-{digest[:16]}.pt"


def pretrain(run: Run, cache: Path) -> dict[str, Any]:
    """Train a model and keep it."""
    model, result = train_model(run, cache)
    torch.save(model.state_dict(), weights_file(run, cache))
    return result


def finetune(run: FineTuning, cache: Path) -> dict[str, Any]:
    """Fine-tune a pretrained model; return held-out losses on both texts, before and after."""
    size = replace(run.pretraining.size, steps=run.steps)
    device, precision = pick_device(), run.pretraining.precision
    weights = weights_file(run.pretraining, cache)
    if not weights.exists():  # the cache was deleted, the ledger was not
        pretrain(run.pretraining, cache)
    model = decoder(size, run.seed)
    model.load_state_dict(torch.load(weights))
    model.to(device)
    new, old = load_tokens(cache / run.text), load_tokens(cache / run.pretraining.text)
    held_out = validation_examples(new, size)

    def held_out_loss(tokens: dict[str, Any]) -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            return evaluate(model, validation_examples(tokens, size).to(device), size.batch_size)

    before = {"new_before": held_out_loss(new), "old_before": held_out_loss(old)}
    method, policy, _ = ARMS[run.arm]
    plan = {}
    if policy is not None:
        torch.manual_seed(run.seed)
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
        plan["lora"] = policy
        warnings.filterwarnings("ignore", message="every trainable matrix belongs to an adapter")  # that is the arm
    optimizer = make_optimizer(model, find_method(method), lr=run.lr, adamw_lr=run.lr, weight_decay=0.0, **plan)
    batches = training_examples(new, size, run.seed)
    result = fit(model, optimizer, batches, held_out, evaluations=1, precision=precision)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {**result, **before, "new": result["losses"][str(run.steps)], "old": held_out_loss(old), "trained": trained}


def compare(pretraining: Run, arm: str, text: Path, steps: int, seeds: Sequence[int], ledger: Ledger) -> Task[Any]:
    """Tune the rate of one arm, then fine-tune with every seed; see ``Pool``."""
    yield [replace(pretraining, seed=seed) for seed in (TUNING_SEED, *seeds)]

    def at(lr: float, seed: int) -> FineTuning:
        return FineTuning(replace(pretraining, seed=seed), text.name, arm, lr, steps, seed)

    start = ARMS[arm][2]
    tried: dict[int, float] = {}
    wanted = [-1, 0, 1]
    while wanted:
        runs = {place: at(start * 2.0**place, TUNING_SEED) for place in wanted}
        yield list(runs.values())
        tried |= {place: ledger[run]["new"] for place, run in runs.items()}
        best = min(tried, key=lambda place: tried[place])
        wanted = [place for place in (best - 1, best + 1) if place not in tried]
    final = [at(start * 2.0**best, seed) for seed in seeds]
    yield final
    return {
        "pretrained": pretraining.method,
        "arm": arm,
        "lr": final[0].lr,
        "tried": {start * 2.0**place: tried[place] for place in sorted(tried)},
        "runs": [ledger[run] for run in final],
    }


def markdown(found: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """Return a row per arm and pretraining, and how each differs from AdamW on the same models."""
    lines = [
        f"{len(seeds)} seeds, each with a pretrained model of its own. Brackets: 95 % intervals.",
        "",
        "| pretrained with | fine-tuned with | lr | trained numbers | held-out loss | minus AdamW's | p |"
        " on the first text: before, after |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        reference = next(
            other for other in found if other["pretrained"] == row["pretrained"] and other["arm"] == "AdamW"
        )
        ours, theirs = ([run["new"] for run in each["runs"]] for each in (row, reference))
        is_reference = row is reference
        difference = confidence([a - b for a, b in zip(ours, theirs, strict=True)])
        before, after = (statistics.fmean(run[key] for run in row["runs"]) for key in ("old_before", "old"))
        lines.append(
            f"| {row['pretrained']} | {row['arm']} | {row['lr']:g} | {row['runs'][0]['trained']:,} |"
            f" {confidence(ours).shown(3)} | {'' if is_reference else difference.shown(3, 1, '+')} |"
            f" {'' if is_reference else f'{paired_p(ours, theirs):.2g}'} | {before:.2f}, {after:.2f} |"
        )
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", type=Path, required=True, help="rates of pretraining, by convergence.py")
    parser.add_argument("--size", choices=list(SIZES), default="2m", help="of the model")
    parser.add_argument("--pretraining-text", nargs="+", default=["python"], help="as in convergence.py")
    parser.add_argument("--text", nargs="+", default=["documentation"], help="what is fine-tuned on")
    parser.add_argument("--pretraining-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=40, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=default_workers(), help="runs at once, one thread each")
    parser.add_argument("--results", type=Path, default=FOLDER / "finetuning.jsonl")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the table")
    args = parser.parse_args()
    if TUNING_SEED in args.seeds or len(set(args.seeds)) < 2:
        parser.error(f"--seeds takes at least two numbers other than {TUNING_SEED}, which is the tuning's")
    return args


def main() -> None:
    """Run the benchmark that the command line asks for."""
    args = parse_arguments()
    cache = args.results.parent / "cache"
    size = replace(SIZES[args.size], steps=args.pretraining_steps)
    base = base_run(size, tokenized(args.pretraining_text, size.vocabulary, cache))
    text = tokenized_by(args.pretraining_text, args.text, size.vocabulary, cache)
    rates = json.loads(args.tuned.read_text())["methods"]
    ledger = Ledger(args.results)
    pool = Pool(work, ledger, cache, args.workers)
    tasks = []
    for name in PRETRAINED:
        tuned = {key: rates[name][key] for key in RATES}
        pretraining = replace(base, method=name, **tuned)
        tasks += [compare(pretraining, arm, text, args.steps, args.seeds, ledger) for arm in ARMS]
    expected = len(PRETRAINED) * (1 + len(args.seeds)) + len(tasks) * (5 + len(args.seeds))
    found = pool.carry_out(tasks, "fine-tuning", expected)
    pool.close()
    args.out.mkdir(parents=True, exist_ok=True)
    table = markdown(found, args.seeds)
    Console().print(table, markup=False, soft_wrap=True)
    (args.out / "finetuning.md").write_text(table)
    record = {"seeds": args.seeds, "arguments": {key: str(value) for key, value in vars(args).items()}, "arms": found}
    (args.out / "finetuning.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
