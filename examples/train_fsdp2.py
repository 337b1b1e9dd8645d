"""Train a language model with FSDP2 and NorMuon, without a framework.

torchrun --nproc-per-node 2 examples/train_fsdp2.py
torchrun --nproc-per-node 4 examples/train_fsdp2.py --resume        a checkpoint loads at any number of processes
torchrun --nproc-per-node 2 --max-restarts 3 examples/train_fsdp2.py   goes on by itself when a process dies
"""

from __future__ import annotations

import argparse
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from settings import (
    end_processes,
    make_adamw,
    make_data,
    make_model,
    normuon_options,
    parse_arguments,
    warmup_steps,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from normuon_plugins import build_normuon


class Run:
    """Everything that a checkpoint holds, as ``torch.distributed.checkpoint`` wants it.

    Attributes:
        step: Optimizer steps taken.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]


def save(run: Run, folder: Path) -> None:
    """Write a checkpoint that is either complete or not there, then delete the ones before."""
    unfinished, finished = folder / "unfinished", folder / f"step-{run.step:08d}"
    dcp.save({"run": run}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        unfinished.rename(finished)
        for other in folder.glob("step-*"):
            if other != finished:
                shutil.rmtree(other)
    dist.barrier()


def load_last(run: Run, folder: Path) -> None:
    """Load the last complete checkpoint, if there is one; what a killed run left unfinished is removed."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
    dist.barrier()
    checkpoints = sorted(folder.glob("step-*"))
    if checkpoints:
        dcp.load({"run": run}, checkpoint_id=checkpoints[-1])


def shard(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Shard every decoder layer, then what is left, over all processes."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batches(dataset: Dataset, args: argparse.Namespace, skip: int):
    """Yield batches for ever, the first ``skip`` left out, as an uninterrupted run would have come to them."""
    sampler = DistributedSampler(dataset, seed=args.seed, drop_last=True)
    loader = DataLoader(dataset, args.batch_size, sampler=sampler, drop_last=True)
    epoch, skip = divmod(skip, len(loader))
    while True:
        sampler.set_epoch(epoch)
        for index, batch in enumerate(loader):
            if index >= skip:
                yield batch
        epoch, skip = epoch + 1, 0


@torch.no_grad()
def evaluate(model: torch.nn.Module, dataset: Dataset, args: argparse.Namespace, device: torch.device) -> float:
    """Return the mean validation loss, in nats per token; every process goes through all of it."""
    model.eval()
    losses = [
        model(**{key: value.to(device) for key, value in batch.items()}).loss
        for batch in DataLoader(dataset, args.batch_size)
    ]
    model.train()
    return torch.stack(losses).mean().item()


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train as the arguments say; print the final validation loss."""
    if dist.get_rank() == 0:
        make_data(args)
    dist.barrier()  # the others find the cached tokens
    training, validation, vocabulary = make_data(args)
    model = shard(make_model(args, vocabulary).to(device), device)
    optimizer = make_adamw(model, args) if args.optim == "adamw" else build_normuon(model, **normuon_options(args))
    run = Run(model, optimizer, get_cosine_schedule_with_warmup(optimizer, warmup_steps(args), args.steps))
    if args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        load_last(run, args.output)
    bar = tqdm(total=args.steps, initial=run.step, desc=args.optim, disable=dist.get_rank() != 0)
    source = batches(training, args, skip=run.step)
    while run.step < args.steps:
        loss = model(**{key: value.to(device) for key, value in next(source).items()}).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.scheduler.step()
        optimizer.zero_grad()
        run.step += 1
        bar.update()
        if run.step == args.steps or run.step % args.save_every == 0:
            save(run, args.output)
    bar.close()
    loss = evaluate(model, validation, args, device)
    if dist.get_rank() == 0:
        print(f"validation loss {loss:.4f} after {run.step} steps; saved in {args.output}")


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0], checkpoint="step-*")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A process that waits longer than this for another gives up, and torchrun starts all of them anew.
    dist.init_process_group(timeout=timedelta(minutes=10))
    try:
        train(args, device)
    finally:
        end_processes()


if __name__ == "__main__":
    main()
