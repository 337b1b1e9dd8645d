"""The same short training run through each framework and through a plain loop; every runner returns name -> weight."""

import itertools
import math

import torch
from torch.utils.data import DataLoader

from tests.models import tiny_llama, token_blocks, whole

STEPS = 6
WARMUP = 2
GLOBAL_BATCH = 4
MAX_GRADIENT_NORM = 1.0
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "adamw_lr": 0.003, "nesterov": True, "ns_dtype": "float64"}


def float64_llama():
    """In float64, the order in which a framework adds gradients up does not show."""
    return tiny_llama().double()


def examples():
    return token_blocks(STEPS * GLOBAL_BATCH)


def weights(model):
    """Return the parameters of a model as whole tensors, by name."""
    wrapper = "_checkpoint_wrapped_module."  # activation checkpointing of FSDP's own
    return {name.replace(wrapper, ""): whole(parameter) for name, parameter in model.named_parameters()}


def shares_work(optimizer):
    """Return whether the last step of NorMuon was divided among processes."""
    return any(team.rounds for team in optimizer._plans[0].teams)


def cosine(step):
    """The schedule, written out once more: linear warmup from zero, then half a cosine to zero."""
    if step < WARMUP:
        return step / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def run_plain_loop():
    """The yardstick: no framework, and groups written by hand instead of planned."""
    from normuon_plugins import NorMuon

    model = float64_llama()
    named = list(model.named_parameters())
    matrices = [(n, p) for n, p in named if ".self_attn." in n or ".mlp." in n]
    others = [(n, p) for n, p in named if not (".self_attn." in n or ".mlp." in n)]
    groups = [{"params": matrices}, {"params": others, "algorithm": "adamw"}]
    optimizer = NorMuon(groups, adjust_lr_fn="match_progress_adamw", **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    for batch in DataLoader(examples(), GLOBAL_BATCH):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return weights(model)


def _train_prepared(accelerator, model, optimizer, scheduler, loader):
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def run_accelerate(ranks=1):
    from accelerate import Accelerator
    from transformers import get_cosine_schedule_with_warmup

    from normuon_plugins.accelerate import prepare_normuon
    from tests.adapters.cpu_start import forget

    forget()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == ranks
    loader = DataLoader(examples(), GLOBAL_BATCH // ranks)
    model, optimizer, loader = prepare_normuon(accelerator, float64_llama(), loader, **OPTIONS)
    scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP * ranks, STEPS * ranks)
    scheduler = accelerator.prepare(scheduler)
    _train_prepared(accelerator, model, optimizer, scheduler, loader)
    assert shares_work(optimizer.optimizer) is (ranks > 1)
    return weights(accelerator.unwrap_model(model))


def run_accelerate_fsdp2():
    """Accelerate's own FSDP2 on CPU."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from torch.distributed.tensor import DTensor

    from normuon_plugins.accelerate import prepare_normuon
    from tests.adapters.cpu_start import forget, pretend_gpus

    forget()
    pretend_gpus()
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    assert accelerator.is_fsdp2
    loader = DataLoader(examples(), GLOBAL_BATCH // accelerator.num_processes)
    model, optimizer, loader = prepare_normuon(accelerator, float64_llama(), loader, **OPTIONS)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, cosine)
    _train_prepared(accelerator, model, optimizer, scheduler, loader)
    assert shares_work(optimizer.optimizer)
    return weights(model)


def trainer_options(folder, **changes):
    """Return what every Trainer of the tests is told, also those of TRL."""
    options = {
        "output_dir": str(folder),
        "optim": "normuon",
        "learning_rate": OPTIONS["lr"],
        "weight_decay": OPTIONS["weight_decay"],
        "per_device_train_batch_size": GLOBAL_BATCH,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return {**options, **changes}


def trainer_arguments(folder, **changes):
    from transformers import TrainingArguments

    options = {
        "optim_args": "adamw_lr=0.003,nesterov=true,ns_dtype=float64",
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP,
        "max_steps": STEPS,
        "max_grad_norm": MAX_GRADIENT_NORM,
    }
    return TrainingArguments(**trainer_options(folder, **{**options, **changes}))


def run_trainer(folder, ranks=1):
    from transformers import Trainer

    from normuon_plugins.hf_trainer import register_normuon

    register_normuon()
    arguments = trainer_arguments(folder, per_device_train_batch_size=GLOBAL_BATCH // ranks)
    assert arguments.world_size == ranks
    trainer = Trainer(model=float64_llama(), args=arguments, train_dataset=examples())
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert shares_work(trainer.optimizer.optimizer) is (ranks > 1)
    return weights(trainer.model)


def lightning_module(model, **changes):
    from lightning.pytorch import LightningModule

    from normuon_plugins.lightning import configure_normuon

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return configure_normuon(self, **{**OPTIONS, "scheduler": "cosine", "warmup": WARMUP, **changes})

    return Module()


def lightning_trainer(folder, **changes):
    from lightning.pytorch import Trainer

    options = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "max_steps": STEPS,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": MAX_GRADIENT_NORM,
    }
    return Trainer(**{**options, **changes})


def run_lightning(folder, ranks=1):
    from torch.utils.data.distributed import DistributedSampler

    model = float64_llama()
    changes = {"devices": ranks, "strategy": "ddp", "use_distributed_sampler": False} if ranks > 1 else {}
    trainer = lightning_trainer(folder, **changes)
    assert trainer.world_size == ranks
    data = examples()
    sampler = DistributedSampler(data, shuffle=False) if ranks > 1 else None
    trainer.fit(lightning_module(model), DataLoader(data, GLOBAL_BATCH // ranks, sampler=sampler))
    assert trainer.global_step == STEPS
    assert shares_work(trainer.optimizers[0]) is (ranks > 1)
    return weights(model)


def run_lightning_fsdp2(folder):
    """Lightning's ModelParallelStrategy, which gives configure_optimizers DTensors."""
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.utils.data.distributed import DistributedSampler

    ranks = torch.distributed.get_world_size()
    module = lightning_module(float64_llama())
    module.configure_model = lambda: fully_shard(module.model, mesh=module.device_mesh["data_parallel"])
    strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    trainer = lightning_trainer(folder, devices=ranks, strategy=strategy, use_distributed_sampler=False)
    data = examples()
    trainer.fit(module, DataLoader(data, GLOBAL_BATCH // ranks, sampler=DistributedSampler(data, shuffle=False)))
    assert trainer.global_step == STEPS
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    assert shares_work(trainer.optimizers[0])
    return weights(module.model)


def run_ddp():
    """torch's DistributedDataParallel alone."""
    from torch.nn.parallel import DistributedDataParallel

    from normuon_plugins import build_normuon

    model = DistributedDataParallel(float64_llama())
    optimizer = build_normuon(model, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loader = DataLoader(examples(), GLOBAL_BATCH // ranks)
    for batch in itertools.islice(loader, rank, None, ranks):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return weights(model.module)
