"""Runs of the Hugging Face Trainer: one process, DDP, both ways to FSDP2; each returns a ``Run``."""

import os
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from tests.adapters.cpu_start import forget, pretend_gpus
from tests.adapters.training import (
    GLOBAL_BATCH,
    STEPS,
    examples,
    float64_llama,
    shares_work,
    trainer_arguments,
    weights,
)
from tests.models import tiny_llama, token_blocks

# Without clipping: under expert parallelism alone, transformers 5.23 leaves the gradients of experts 1/ep_size as large
# as in one process. NorMuon does not see the size of a gradient; the norm that clips all gradients does.
UNCLIPPED = {"max_grad_norm": 0.0}


class Run(NamedTuple):
    """What a run left behind.

    Attributes:
        weights: Name -> whole tensor.
        placements: Mesh dimensions and placements of each parameter, as text; empty for a plain tensor.
        fsdp2: Whether Accelerate says that it is in FSDP2 mode.
        shared: Whether the last step of NorMuon was divided among processes.
        log: ``trainer.state.log_history``.
    """

    weights: dict[str, torch.Tensor]
    placements: dict[str, str]
    fsdp2: bool
    shared: bool
    log: list[dict[str, Any]]


def float64(model):
    """Return ``model``, a function of a seed, in float64."""
    return lambda seed=0: model(seed).double()


def gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=16, **dropout))


def bert(seed=0):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=64, max_position_embeddings=16))


def tied_llama(seed=0):
    return tiny_llama(seed, tie_word_embeddings=True)


def mixtral(seed=0):
    """Four experts, two layers, in transformers' plain loop over experts: its fused kernel knows no float64."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**_moe_sizes(), num_local_experts=4, num_experts_per_tok=2))
    model.set_experts_implementation("eager")
    return model


def qwen3_moe(seed=0):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    sizes = {**_moe_sizes(), "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    model.set_experts_implementation("eager")
    return model


def _moe_sizes():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "use_cache": False}
    return {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}


def moved(run, model):
    """Return whether every parameter of ``model`` has another value after the run."""
    return all(not torch.equal(parameter, run.weights[name]) for name, parameter in weights(model).items())


def train(folder, model, *, resume=None, callbacks=(), **changes):
    """Train on the global batch of all runs, divided among the processes that there are."""
    from transformers import Trainer

    from normuon_plugins.hf_trainer import register_normuon

    register_normuon()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = GLOBAL_BATCH // ranks // changes.get("gradient_accumulation_steps", 1)
    arguments = trainer_arguments(folder, **{"per_device_train_batch_size": batch, **changes})
    assert arguments.world_size == ranks
    trainer = Trainer(model=model, args=arguments, train_dataset=examples(), eval_dataset=examples()[:4])
    for callback in callbacks:
        trainer.add_callback(callback(trainer))
    trainer.train(resume_from_checkpoint=resume and str(resume))
    parameters = dict(trainer.model.named_parameters())
    optimizer = trainer.optimizer.optimizer
    return Run(
        weights=weights(trainer.model),
        placements={name: _placement(parameter) for name, parameter in parameters.items()},
        fsdp2=trainer.accelerator.is_fsdp2,
        shared=hasattr(optimizer, "_plans") and shares_work(optimizer),
        log=trainer.state.log_history,
    )


def train_alone(folder, seed):
    """Train on data of one's own where Accelerate sees no accelerator: it is alone then, whatever group there is."""
    from transformers import Trainer

    from normuon_plugins.hf_trainer import register_normuon

    register_normuon()
    forget()
    arguments = trainer_arguments(folder, use_cpu=False)
    assert arguments.world_size == 1
    data = token_blocks(STEPS * GLOBAL_BATCH, seed=seed)
    trainer = Trainer(model=float64_llama(), args=arguments, train_dataset=data)
    trainer.train()
    forget()
    return weights(trainer.model)


def _placement(parameter):
    """Return "mesh dimensions: placements", without the former where Accelerate gives them no name."""
    if not isinstance(parameter, DTensor):
        return ""
    placements = ", ".join(map(repr, parameter.placements))
    dimensions = parameter.device_mesh.mesh_dim_names
    return f"{', '.join(dimensions)}: {placements}" if dimensions else placements


@contextmanager
def pretended_accelerators():
    """Make Accelerate see accelerators where there are none: on CPU the Trainer takes fsdp for DDP, without a word."""
    forget()
    try:
        yield pretend_gpus()
    finally:
        forget()


def train_fsdp2(folder, model, *, config=None, **changes):
    """Train under ``TrainingArguments(fsdp=True)``: Accelerate shards the model after the optimizer was built."""
    changes |= {"fsdp": True, "fsdp_config": {"version": 2, **(config or {})}}
    with pretended_accelerators():
        return train(folder, model, accelerator_config={"use_configured_state": True}, **changes)


def train_distributed(folder, source, distributed, **changes):
    """Train a model that ``from_pretrained(distributed_config=...)`` sharded: DTensors before there is a Trainer."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    with pretended_accelerators():  # tensor parallelism asks for them
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float64,
            experts_implementation="eager",
            distributed_config=DistributedConfig(**distributed),
        )
        return train(folder, model, accelerator_config={"use_configured_state": True}, **changes)
