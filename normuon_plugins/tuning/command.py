"""What ``normuon tune`` takes and does."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from normuon_plugins.tuning.batches import DEFAULT_STEPS, HELD_OUT_EVERY
from normuon_plugins.tuning.finder import DEFAULT_BUDGET, DEFAULT_LR, find_learning_rates
from normuon_plugins.tuning.result import LearningRates

DESCRIPTION = """Search for both learning rates of NorMuon, lr (hidden matrices) and adamw_lr (everything else).

Trains many short runs from the model's own weights, and prints a table and the line to paste.
MODEL and --text are enough for a causal language model. For any other model write a function without arguments that
returns (model, batches), or (model, batches, options), options being keywords of
normuon_plugins.tuning.find_learning_rates such as {"loss": function}."""
EXAMPLES = """examples:
  normuon tune ./checkpoint --text book.txt notes.txt --lr 3e-4 --out rates.png
  normuon tune my_package.my_module:make_model_and_batches --steps 200 --budget 30
"""
WORDS = {"true": True, "false": False, "none": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder or hub id of a causal language model, or module:function"
    )
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="text files to train and to judge on")
    parser.add_argument(
        "--lr",
        type=float,
        help="learning rate that you have, for AdamW: the search begins there, and"
        f" says what is gained over it. Without it, it begins at {DEFAULT_LR:g} and looks further",
    )
    parser.add_argument("--adamw-lr", type=float, help="the same of everything else (as --lr)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of a full run ({DEFAULT_STEPS})")
    parser.add_argument(
        "--budget", type=int, default=DEFAULT_BUDGET, metavar="RUNS", help=f"full runs to spend ({DEFAULT_BUDGET})"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="with --text: sequences of a batch (8)")
    parser.add_argument("--sequence-length", type=int, default=256, help="with --text: tokens of a sequence (256)")
    parser.add_argument(
        "--fresh", action="store_true", help="with --text: begin with new weights from the config, to pretrain"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of build_normuon in every run, such as weight_decay=0.05. May be repeated",
    )
    parser.add_argument(
        "--device", help="where to train; cuda if there is one, where --text trains in bfloat16 autocast"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="picture of the loss over both rates to write")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def tune(options: argparse.Namespace) -> str:
    """Search as the command line says, with progress on stderr, and return what to print.

    Raises:
        ValueError, TypeError, OSError, ImportError: In one sentence, where the command line or what it names is wrong.
    """
    if options.out is not None:
        from normuon_plugins.tuning.figures import check_target

        check_target(options.out)
    given = {name: value for name in ("lr", "adamw_lr", "steps") if (value := getattr(options, name)) is not None}
    with redirect_stdout(sys.stderr):  # where anything belongs that a model's own code prints
        result = _search(options, {**given, "budget": options.budget, **dict(map(read_option, options.option))})
    if options.out is not None:
        result.draw(options.out)
    if options.json:
        return json.dumps(result.to_dict(), indent=1)
    return str(result) if options.out is None else f"{result}\n\nwrote {options.out}"


def read_option(text: str) -> tuple[str, Any]:
    """Return key and value of ``KEY=VALUE``, the value as Python reads it, else as a word.

    Raises:
        ValueError: If there is no key or no value.

    Example:
        >>> [read_option(text) for text in ("beta2=0.9", "nesterov=false", "lora=b", "adamw_betas=(0.9, 0.99)")]
        [('beta2', 0.9), ('nesterov', False), ('lora', 'b'), ('adamw_betas', (0.9, 0.99))]
    """
    key, _, value = text.partition("=")
    if not key or not value:
        raise ValueError(f"--option {text!r} is not KEY=VALUE, such as weight_decay=0.05")
    if value.lower() in WORDS:
        return key, WORDS[value.lower()]
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _search(options: argparse.Namespace, keywords: dict[str, Any]) -> LearningRates:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if ":" in options.model and not Path(options.model).exists():
        made = _made(options.model)
        if not isinstance(made, tuple) or len(made) not in (2, 3):
            raise ValueError(f"{options.model} must return (model, batches) or (model, batches, options).")
        model, batches, *more = made
        keywords = {**(more[0] if more else {}), **keywords}
        return find_learning_rates(model.to(device) if options.device else model, batches, **keywords)
    if not options.text:
        raise ValueError("--text FILE is missing: what should the model train on? (or name module:function)")
    from normuon_plugins.tuning.language_model import autocast_loss, load_language_model, token_batches

    model, tokenizer = load_language_model(options.model, fresh=options.fresh)
    wanted = (options.steps or DEFAULT_STEPS) * HELD_OUT_EVERY // (HELD_OUT_EVERY - 1) + 1
    sizes = {"batch_size": options.batch_size, "sequence_length": options.sequence_length}
    batches = token_batches(options.text, tokenizer, **sizes, count=wanted)
    return find_learning_rates(model.to(device), batches, loss=autocast_loss(device), **keywords)


def _made(name: str) -> Any:
    """Return what the function that ``package.module:function`` names returns; modules in the working directory count.

    Raises:
        ValueError: If there is no such function.
        RuntimeError: If it raises; with its own error as the cause, which the user needs to see whole.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} names no function: {error}") from error
    try:
        return found()
    except Exception as error:
        raise RuntimeError(f"{name}() raised {type(error).__name__}") from error
