"""Train a language model with the Hugging Face Trainer and NorMuon.

python examples/train_hf_trainer.py
torchrun --nproc-per-node 2 examples/train_hf_trainer.py --optim normuon --lr 3e-3
"""

from __future__ import annotations

import argparse

import torch
from settings import (
    BETAS,
    bf16_is_fast,
    end_processes,
    learning_rates,
    make_data,
    make_model,
    normuon_options,
    parse_arguments,
    warmup_steps,
)
from transformers import Trainer, TrainingArguments, set_seed

from normuon_plugins.hf_trainer import register_normuon


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    """Translate the arguments that all three programs share."""
    if args.optim == "adamw":
        optimizer = {"optim": "adamw_torch_fused", "adam_beta1": BETAS[0], "adam_beta2": BETAS[1]}
    else:
        register_normuon()
        options = normuon_options(args)
        words = ",".join(f"{key}={value}" for key, value in options.items() if key not in ("lr", "weight_decay"))
        optimizer = {"optim": "normuon", "optim_args": words}
    return TrainingArguments(
        output_dir=str(args.output),
        learning_rate=learning_rates(args)[0],  # under AdamW of all parameters: the Trainer has one rate
        weight_decay=args.weight_decay,
        **optimizer,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps(args),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        save_steps=args.save_every,
        save_total_limit=2,
        logging_steps=args.eval_every,
        seed=args.seed,
        bf16=bf16_is_fast(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0], checkpoint="checkpoint-*")
    options = training_arguments(args)
    set_seed(args.seed)
    with options.main_process_first():  # the others find the cached tokens
        training, validation, vocabulary = make_data(args)
    trainer = Trainer(model=make_model(args, vocabulary), args=options, train_dataset=training, eval_dataset=validation)
    trainer.train(resume_from_checkpoint=args.resume)
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"validation loss {loss:.4f} after {trainer.state.global_step} steps; saved in {args.output}")
    end_processes()


if __name__ == "__main__":
    main()
