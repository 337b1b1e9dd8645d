"""Train a language model with PyTorch Lightning and NorMuon.

python examples/train_lightning.py
torchrun --nproc-per-node 2 examples/train_lightning.py --optim normuon --lr 3e-3
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
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
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from normuon_plugins.lightning import configure_normuon


class LanguageModel(LightningModule):
    """A causal language model that Lightning can train."""

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        super().__init__()
        self.model = model
        self.args = args

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("training_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self.log("validation_loss", self.model(**batch).loss, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.args.optim == "adamw":
            # Lightning does not clip gradients for a fused optimizer under mixed precision.
            optimizer = make_adamw(self, self.args, fused=not bf16_is_fast())
            schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps(self.args), self.args.steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        return configure_normuon(self, scheduler="cosine", warmup=warmup_steps(self.args), **normuon_options(self.args))


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0], checkpoint="last.ckpt")
    seed_everything(args.seed)
    training, validation, vocabulary = make_data(args)
    module = LanguageModel(make_model(args, vocabulary), args)
    checkpoint = ModelCheckpoint(args.output, every_n_train_steps=args.save_every, save_last=True, save_top_k=0)
    trainer = Trainer(
        max_steps=args.steps,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or "auto",  # under torchrun, what it started
        precision="bf16-mixed" if bf16_is_fast() else "32-true",
        gradient_clip_val=1.0,
        callbacks=[checkpoint, LearningRateMonitor("step")],
        logger=CSVLogger(args.output, name="log"),
        val_check_interval=args.eval_every,
        check_val_every_n_epoch=None,
        log_every_n_steps=args.eval_every,
    )
    loaders = (
        DataLoader(training, args.batch_size, shuffle=True, generator=torch.Generator().manual_seed(args.seed)),
        DataLoader(validation, args.batch_size),
    )
    trainer.fit(module, *loaders, ckpt_path="last" if args.resume else None)
    loss = trainer.validate(module, loaders[1], verbose=False)[0]["validation_loss"]
    if trainer.is_global_zero:
        print(f"validation loss {loss:.4f} after {trainer.global_step} steps; saved in {args.output}")
    end_processes()


if __name__ == "__main__":
    main()
