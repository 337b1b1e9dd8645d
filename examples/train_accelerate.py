"""Train a language model with Accelerate and NorMuon.

python examples/train_accelerate.py
accelerate launch examples/train_accelerate.py --optim normuon --lr 3e-3
torchrun --nproc-per-node 2 examples/train_accelerate.py --resume
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from settings import (
    bf16_is_fast,
    end_processes,
    make_adamw,
    make_data,
    make_model,
    normuon_options,
    parse_arguments,
    warmup_steps,
)
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from normuon_plugins.accelerate import prepare_normuon


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    Attributes:
        step: Optimizer steps taken.
        losses: Step -> validation loss, in nats per token.
    """

    step: int = 0
    losses: dict[int, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, object]:
        return {"step": self.step, "losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.losses = state["step"], state["losses"]


@dataclass
class Result:
    """What a run measured: validation losses, seconds of each step, bytes of optimizer state in one process."""

    losses: dict[int, float]
    step_seconds: list[float]
    state_bytes: int


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> float:
    """Return the mean validation loss over all processes, in nats per token."""
    model.eval()
    losses = [accelerator.gather_for_metrics(model(**batch).loss.repeat(len(batch["input_ids"]))) for batch in loader]
    model.train()
    return torch.cat(losses).mean().item()


def train(args: argparse.Namespace) -> Result:
    """Train as the arguments say; print the final validation loss and return what was measured."""
    # Without cpu=True, on a machine without an accelerator, every process of torchrun would train alone.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if bf16_is_fast() else "no",
        step_scheduler_with_optimizer=False,  # a schedule in steps of the optimizer, at any number of processes
    )
    set_seed(args.seed)
    with accelerator.main_process_first():  # the others find the cached tokens
        training, validation, vocabulary = make_data(args)
    model = make_model(args, vocabulary)
    loaders = [
        DataLoader(training, args.batch_size, shuffle=True, generator=torch.Generator().manual_seed(args.seed)),
        DataLoader(validation, args.batch_size),
    ]
    if args.optim == "adamw":
        prepared = accelerator.prepare(model, make_adamw(model, args), *loaders)
    else:
        prepared = prepare_normuon(accelerator, model, *loaders, **normuon_options(args))
    model, optimizer, loader, validation_loader = prepared
    scheduler = accelerator.prepare(get_cosine_schedule_with_warmup(optimizer, warmup_steps(args), args.steps))
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if args.resume:
        accelerator.load_state(str(args.output))

    step_seconds = []
    batches = endless(accelerator, loader, skip=progress.step)
    bar = tqdm(total=args.steps, initial=progress.step, desc=args.optim, disable=not accelerator.is_local_main_process)
    while progress.step < args.steps:
        start = time.perf_counter()
        loss = model(**next(batches)).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step_seconds.append(time.perf_counter() - start)
        progress.step += 1
        bar.update()
        last = progress.step == args.steps
        if last or progress.step % args.eval_every == 0:
            progress.losses[progress.step] = evaluate(accelerator, model, validation_loader)
            bar.set_postfix(validation_loss=f"{progress.losses[progress.step]:.4f}")
        if last or progress.step % args.save_every == 0:
            accelerator.save_state(str(args.output))
    bar.close()
    states = optimizer.optimizer.state.values()
    state_bytes = sum(value.nbytes for state in states for value in state.values())
    accelerator.print(
        f"validation loss {progress.losses[progress.step]:.4f} after {progress.step} steps; saved in {args.output}"
    )
    accelerator.free_memory()
    accelerator.end_training()
    return Result(progress.losses, step_seconds, state_bytes)


def endless(accelerator: Accelerator, loader: DataLoader, skip: int):
    """Yield batches for ever, the first ``skip`` left out, as an uninterrupted run would have come to them."""
    epoch, skip = divmod(skip, len(loader))
    while True:
        loader.set_epoch(epoch)
        yield from accelerator.skip_first_batches(loader, skip) if skip else loader
        epoch, skip = epoch + 1, 0


def main() -> None:
    train(parse_arguments(__doc__.splitlines()[0], checkpoint="random_states_0.pkl"))
    end_processes()


if __name__ == "__main__":
    main()
