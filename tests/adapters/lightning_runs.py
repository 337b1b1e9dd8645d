"""Lightning and Fabric runs of the tiny Llama in several processes, and what is left of them afterwards."""

import functools
import math
import tempfile
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from normuon_plugins import build_normuon, clip_grad_norm_
from normuon_plugins.lightning import NorMuonMetrics, setup_normuon
from tests.adapters.training import (
    GLOBAL_BATCH,
    MAX_GRADIENT_NORM,
    OPTIONS,
    STEPS,
    cosine,
    examples,
    float64_llama,
    lightning_module,
    lightning_trainer,
    shares_work,
    weights,
)
from tests.models import tiny_llama, whole
from tests.ranks import run_ranks

CLIP_VALUE = 1e-3
TENSOR_PARALLEL = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}, {"o_proj", "down_proj"}


def shard(model, mesh):
    """Shard a Llama as Lightning's documentation does: tensor parallel first, then FSDP2 layer by layer."""
    by_column, by_row = TENSOR_PARALLEL
    for layer in model.model.layers:
        if mesh["tensor_parallel"].size() > 1:
            names = {name: name.split(".")[-1] for name, _ in layer.named_modules()}
            styles = {name: ColwiseParallel() for name, last in names.items() if last in by_column}
            styles |= {name: RowwiseParallel() for name, last in names.items() if last in by_row}
            parallelize_module(layer, mesh["tensor_parallel"], styles)
        if mesh["data_parallel"].size() > 1:
            fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"]) if mesh["data_parallel"].size() > 1 else model


def sharded_module(model, *, clip=clip_grad_norm_, **options):
    """A module that shards itself and clips by ``clip``; None leaves clipping to Lightning."""
    module = lightning_module(model, **options)

    def configure_model():
        if module.device_mesh is not None:  # under DDP there is none
            shard(model, module.device_mesh)

    def configure_gradient_clipping(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if gradient_clip_val:
            clip(module.parameters(), gradient_clip_val)

    module.configure_model = configure_model
    if clip is not None:
        module.configure_gradient_clipping = configure_gradient_clipping
    return module


def fit(folder, module, data, *, strategy, replicas, resume=None, **changes):
    """Train on ``data`` in its order; the sampler that Lightning puts in by itself would shuffle it."""
    ranks = torch.distributed.get_world_size()
    replica = torch.distributed.get_rank() // (ranks // replicas)
    sampler = DistributedSampler(data, replicas, replica, shuffle=False)
    loader = DataLoader(data, GLOBAL_BATCH // replicas, sampler=sampler)
    trainer = lightning_trainer(folder, devices=ranks, strategy=strategy, use_distributed_sampler=False, **changes)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    return trainer


def full_state(optimizer):
    """Return the tensors of the optimizer's state, by name of the parameter and key."""
    return {
        f"{name}/{key}": whole(value)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def train(folder, data, tensor, clip=clip_grad_norm_, **changes):
    """Return the weights after the whole run, what they were held in, and whether ranks shared the step."""
    module = sharded_module(float64_llama(), clip=clip)
    strategy = ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)
    trainer = fit(folder, module, examples(), strategy=strategy, replicas=data, **changes)
    return {
        "steps": trainer.global_step,
        "sharded": {name for name, parameter in module.model.named_parameters() if isinstance(parameter, DTensor)},
        "dimensions": max(p.device_mesh.ndim for p in module.parameters() if isinstance(p, DTensor)),
        "shares_work": shares_work(trainer.optimizers[0]),
        "weights": weights(module.model),
    }


def resume(folder, make_strategy, replicas):
    """Return weights and state of a run of six steps, and of one that went on from a checkpoint after three.

    All batches of a process are alike: Lightning 2.6 begins the loader anew one step late after a resume.
    """
    data = examples()[:GLOBAL_BATCH] * (STEPS // 2)

    def run(model, steps, **changes):
        module = sharded_module(model, scheduler="constant")
        trainer = fit(folder, module, data, strategy=make_strategy(), replicas=replicas, max_steps=steps, **changes)
        return trainer, {**weights(module.model), **full_state(trainer.optimizers[0])}

    _, whole = run(tiny_llama(), STEPS)
    trainer, _ = run(tiny_llama(), STEPS // 2)
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    _, resumed = run(tiny_llama(seed=7), STEPS, resume=f"{folder}/half.ckpt")
    return whole, resumed


def resume_sharded(folder, data, tensor):
    """Return ``resume`` for a distributed checkpoint, a folder, and for a full one, a file."""
    return {
        kind: resume(
            f"{folder}/{kind}-{data}-{tensor}",
            lambda distributed=kind == "distributed": ModelParallelStrategy(
                data, tensor, save_distributed_checkpoint=distributed
            ),
            data,
        )
        for kind in ("distributed", "full")
    }


def train_mixed(folder):
    """Return what half precision leaves: bf16-mixed under FSDP2, and fp16 with overflowing steps under DDP."""
    options = {"scheduler": None, "warmup": 0, "ns_dtype": "float32"}
    module = sharded_module(tiny_llama(), **options)
    fit(folder, module, examples(), strategy=ModelParallelStrategy(2, 1), replicas=2, precision="bf16-mixed")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))
    scaled = sharded_module(tiny_llama(), **options)
    fit(folder, scaled, examples(), strategy="ddp", replicas=2, plugins=[plugin])
    return {
        "bf16": weights(module.model),
        "fp16": weights(scaled.model),
        "skipped": 20 - math.log2(plugin.scaler.get_scale()),
    }


def make_fabric(strategy="auto"):
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
    fabric.launch()
    return fabric


def fabric_fsdp2(**changes):
    return make_fabric(
        FabricModelParallel(shard, torch.distributed.get_world_size(), tensor_parallel_size=1, **changes)
    )


def fabric_steps(fabric, model, optimizer, data, scheduler=None):
    """Take one step for every ``GLOBAL_BATCH`` of ``data``."""
    for start in range(0, len(data), GLOBAL_BATCH):
        block = data[start : start + GLOBAL_BATCH][fabric.global_rank :: fabric.world_size]
        fabric.backward(model(**{key: torch.stack([example[key] for example in block]) for key in block[0]}).loss)
        fabric.clip_gradients(model, optimizer, max_norm=MAX_GRADIENT_NORM)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def train_fabric(fabric, *, joint=False):
    """Return the weights after the run that every framework takes; ``joint`` gives both to ``fabric.setup``."""
    model = float64_llama()
    if joint:
        model, optimizer = fabric.setup(model, build_normuon(model, **OPTIONS))
    else:
        model, optimizer = setup_normuon(fabric, model, **OPTIONS)
    fabric_steps(fabric, model, optimizer, examples(), LambdaLR(optimizer, cosine))
    return {
        "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "shares_work": shares_work(optimizer.optimizer),
        "names": [name for group in optimizer.param_groups for name in group["param_names"]],
        "weights": weights(model.module),
    }


def resume_fabric(make, path):
    """Return weights and state of a run of six steps, and of one saved and loaded after three."""
    data = examples()

    def run(seed, steps, load=False, save=False):
        fabric = make()
        model, optimizer = setup_normuon(fabric, tiny_llama(seed), lr=0.01)
        if load:
            fabric.load(path, {"model": model, "optimizer": optimizer})
        fabric_steps(fabric, model, optimizer, data[steps.start * GLOBAL_BATCH : steps.stop * GLOBAL_BATCH])
        if save:
            fabric.save(path, {"model": model, "optimizer": optimizer})
        return {**weights(model.module), **full_state(optimizer)}

    whole = run(0, range(STEPS))
    run(0, range(STEPS // 2), save=True)
    return whole, run(7, range(STEPS // 2, STEPS), load=True)


def refused_joint_setup(fabric):
    """Return the message of the first step after both were given to ``fabric.setup``."""
    try:
        train_fabric(fabric, joint=True)
    except RuntimeError as error:
        return str(error)
    return ""


def _two_ranks(folder):
    logger = CSVLogger(folder)
    metrics = {"logger": logger, "callbacks": [NorMuonMetrics()], "log_every_n_steps": 2}
    return {
        "fsdp2": train(f"{folder}/fsdp2", 2, 1, **metrics),
        "metrics": (Path(logger.log_dir) / "metrics.csv").read_text(),
        "tp": train(f"{folder}/tp", 1, 2),
        "mixed": train_mixed(folder),
        "resumed": {
            "ddp": resume(f"{folder}/ddp", lambda: "ddp", 2),
            **{f"fsdp2 {kind}": runs for kind, runs in resume_sharded(folder, 2, 1).items()},
            **{f"tp {kind}": runs for kind, runs in resume_sharded(folder, 1, 2).items()},
        },
        "fabric": {"ddp": train_fabric(make_fabric("ddp")), "fsdp2": train_fabric(fabric_fsdp2())},
        "fabric joint ddp": train_fabric(make_fabric("ddp"), joint=True),
        "fabric joint fsdp2": refused_joint_setup(fabric_fsdp2()),
        "fabric resumed": {
            "ddp": resume_fabric(lambda: make_fabric("ddp"), f"{folder}/fabric-ddp.ckpt"),
            "distributed": resume_fabric(fabric_fsdp2, f"{folder}/fabric-distributed"),
            "full": resume_fabric(
                lambda: fabric_fsdp2(save_distributed_checkpoint=False), f"{folder}/fabric-full.ckpt"
            ),
        },
    }


@functools.cache
def two_ranks():
    """Everything that the tests say about two processes, from one spawn; by rank."""
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(_two_ranks, 2, folder)


def _four_ranks(folder):
    by_value = {"gradient_clip_val": CLIP_VALUE, "gradient_clip_algorithm": "value"}
    return {
        "clipped by norm": train(f"{folder}/norm", 2, 2),
        "clipped by value": train(f"{folder}/value", 2, 2, clip=None, **by_value),
        "resumed": resume_sharded(folder, 2, 2),
    }


@functools.cache
def four_ranks():
    """FSDP2 over tensor parallel, 2 x 2; by rank."""
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(_four_ranks, 4, folder)
