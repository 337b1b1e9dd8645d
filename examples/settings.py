"""What the three training programs have in common: their arguments, their model, their optimizer options."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from corpus import Blocks, load_corpus
from torch import nn
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from normuon_plugins import plan_parameters
from normuon_plugins.core.orthogonalize import fast_matmul_dtype

OPTIMIZERS = ("adamw", "muon", "normuon")
# Peak learning rates of the hidden matrices and of everything else. For the small Llama, each optimizer's own best
# hidden rate on powers of two, with the default text and length; for a pretrained --model, where AdamW's usually lies.
RATES = {"adamw": (8e-3, 3.2e-2), "muon": (1.6e-2, 3.2e-2), "normuon": (8e-3, 3.2e-2)}
PRETRAINED_RATES = {"adamw": (1e-4, 1e-4), "muon": (4e-4, 1e-4), "normuon": (1e-4, 1e-4)}
# AdamW's betas for language models, the same for every contender (NorMuon's AdamW groups have them by default).
BETAS = (0.9, 0.95)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return the arguments of data, model and training that every program takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--text", type=Path, nargs="+", default=[], help="files or folders; Python's own source if absent"
    )
    data.add_argument("--dataset", help="name of a hub dataset with a column 'text', instead of --text")
    data.add_argument("--vocabulary", type=int, default=2048, help="size of the tokenizer trained on the corpus")
    data.add_argument("--sequence-length", type=int, default=128, help="tokens per example")
    data.add_argument("--cache", type=Path, default=Path("runs/cache"), help="folder for the tokenized corpus")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="hub name or local folder of a causal language model; a small Llama if absent")
    model.add_argument("--width", type=width, default=192, help="hidden size of the small Llama, a multiple of 64")
    model.add_argument("--layers", type=int, default=4, help="layers of the small Llama")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--lr", type=float, help="peak learning rate of the hidden matrices; tuned for --optim if absent"
    )
    training.add_argument("--adamw-lr", type=float, help="of everything else; --lr if absent, tuned without --lr")
    training.add_argument(
        "--weight-decay", type=float, default=0.1, help="of the hidden matrices, whatever trains them"
    )
    training.add_argument("--steps", type=int, default=150, help="optimizer steps")
    training.add_argument("--batch-size", type=int, default=16, help="examples per process and step")
    training.add_argument("--warmup", type=float, default=0.13, help="share of the steps before the cosine begins")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--eval-every", type=int, default=15, help="steps between evaluations")
    training.add_argument("--eval-batches", type=int, default=12, help="batches per evaluation")
    training.add_argument("--save-every", type=int, default=75, help="steps between checkpoints")
    return parser


def warmup_steps(args: argparse.Namespace) -> int:
    """Return the steps of linear warmup from zero."""
    return round(args.warmup * args.steps)


def width(text: str) -> int:
    """Return the number in ``text`` if it is a whole number of attention heads."""
    if int(text) < 64 or int(text) % 64:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 64, the size of an attention head")
    return int(text)


def parse_arguments(
    description: str, arguments: Sequence[str] | None = None, *, checkpoint: str = "*"
) -> argparse.Namespace:
    """Read the command line of one run.

    Args:
        description: First line of ``--help``.
        arguments: In place of the command line, where a program calls another.
        checkpoint: Pattern of the files that the program's own checkpoints leave in ``--output``.
    """
    parser = make_parser(description)
    parser.add_argument("--optim", choices=OPTIMIZERS, default="normuon")
    parser.add_argument("--output", type=Path, default=Path("runs") / Path(sys.argv[0]).stem, help="for checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    args = parser.parse_args(arguments)
    record = args.output / "optim.txt"
    if args.resume:
        if not list(args.output.glob(checkpoint)):
            parser.error(f"--resume: there is no checkpoint of this program in {args.output}")
        if record.exists() and record.read_text() != args.optim:
            parser.error(f"--resume: the run in {args.output} trains with --optim {record.read_text()}")
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.resume:  # a file that some processes write while others read it is empty for a moment
        record.write_text(args.optim)
    return args


def make_data(args: argparse.Namespace) -> tuple[Blocks, Subset[Any], int]:
    """Return training examples, a fixed sample of the validation examples, and the size of the vocabulary."""
    training, validation, vocabulary = load_corpus(
        text=args.text,
        dataset=args.dataset,
        model=args.model,
        vocabulary=args.vocabulary,
        sequence_length=args.sequence_length,
        cache=args.cache,
    )
    order = torch.randperm(len(validation), generator=torch.Generator().manual_seed(0))
    sample = order[: args.eval_batches * args.batch_size].tolist()
    return training, Subset(validation, sample), vocabulary


def make_model(args: argparse.Namespace, vocabulary: int) -> nn.Module:
    """Return ``--model``, or a small Llama with weights drawn from ``--seed``."""
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        max_position_embeddings=args.sequence_length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    initialize(model)
    return model


@torch.no_grad()
def initialize(model: LlamaForCausalLM) -> None:
    """Draw the weights of a Llama as torchtitan does (its ``models/llama3``).

    transformers draws embeddings with a standard deviation of 0.02. In a small model the first layers then drown them,
    and AdamW hardly learned at any rate that was tried: the comparison would be one of initializations.
    """
    model.model.embed_tokens.weight.normal_()
    model.lm_head.weight.normal_(std=model.config.hidden_size**-0.5)
    for index, layer in enumerate(model.model.layers):
        std = 0.02 / (2 * (index + 1)) ** 0.5
        for linear in (layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.weight.normal_(std=std)


def learning_rates(args: argparse.Namespace) -> tuple[float, float]:
    """Return the peak learning rates of the hidden matrices and of everything else."""
    rates = PRETRAINED_RATES if args.model else RATES
    lr, adamw_lr = rates[args.optim] if args.lr is None else (args.lr, args.lr)
    return lr, adamw_lr if args.adamw_lr is None else args.adamw_lr


def make_adamw(model: nn.Module, args: argparse.Namespace, *, fused: bool = True) -> torch.optim.AdamW:
    """Return the baseline: torch's AdamW, with rates and weight decay on the same parameters as NorMuon's."""
    plan = plan_parameters(model)
    groups = [
        {
            "params": [row.parameter for row in plan if (row.algorithm == "normuon") is hidden],
            "lr": lr,
            "weight_decay": args.weight_decay if hidden else 0.0,
        }
        for hidden, lr in zip((True, False), learning_rates(args), strict=True)
    ]
    return torch.optim.AdamW(groups, betas=BETAS, fused=fused)


def normuon_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what ``prepare_normuon`` and ``configure_normuon`` are given; Muon has no neuron step and one size."""
    lr, adamw_lr = learning_rates(args)
    options = {"lr": lr, "adamw_lr": adamw_lr, "weight_decay": args.weight_decay}
    muon = {"normalize_neurons": False, "adjust_lr_fn": "match_rms_adamw"}
    return {**options, **(muon if args.optim == "muon" else {})}


def bf16_is_fast() -> bool:
    """Return whether training should run under bf16 autocast on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return fast_matmul_dtype(device) == torch.bfloat16


def end_processes() -> None:
    """Leave the process group, as the last thing that one of several processes does.

    A thread of gloo that lets go of the tensors of the last collective needs the interpreter for a moment. Where the
    interpreter is ending already, that aborts the process ("terminate called without an active exception"), also after
    ``destroy_process_group()`` where something still refers to the group, as a DDP model and the caches of DTensor do:
    https://github.com/pytorch/pytorch/pull/179291.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(0.5)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
