"""Accelerate's own code in gloo processes on CPU: each run returns what it did, for tests to compare.

``accelerate launch -m tests.adapters.accelerate_runs PROGRAM`` runs a program as if there were GPUs, see ``cpu_start``.
"""

import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from normuon_plugins import NorMuon, build_normuon
from normuon_plugins.accelerate import prepare_normuon
from tests.adapters.cpu_start import forget, pretend_gpus
from tests.adapters.training import GLOBAL_BATCH, OPTIONS, STEPS, cosine, examples, float64_llama, shares_work
from tests.models import tiny_llama, whole

# Below the norm of the gradients of every step, so that each step is scaled by a factor of its own.
CLIP = 0.5
WRAP = {"auto_wrap_policy": "transformer_based_wrap"}


def sharding(plugin=None, **options):
    """Return an Accelerator that shards over all processes, on CPU."""
    forget()
    pretend_gpus()
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **(plugin or {})})
    return Accelerator(cpu=True, fsdp_plugin=plugin, **options)


def replicating(**options):
    """Return an Accelerator of DDP, or of one process where there is one."""
    forget()
    return Accelerator(cpu=True, **options)


def tied_llama():
    return tiny_llama(tie_word_embeddings=True).double()


def half_frozen_llama():
    model = float64_llama()
    for part in (model.model.embed_tokens, model.model.layers[0]):
        part.requires_grad_(False)
    return model


def named(model):
    """Return the parameters by the names that the model gave them before anything wrapped it."""
    wrappers = ("_checkpoint_wrapped_module.", "module.")
    parameters = dict(model.named_parameters())
    for wrapper in wrappers:
        parameters = {name.replace(wrapper, ""): parameter for name, parameter in parameters.items()}
    return parameters


def whole_weights(model):
    return {name: whole(parameter) for name, parameter in named(model).items()}


class Run:
    """A prepared model with its optimizer, loader and schedule, trained step by step.

    Args:
        accelerator: Of this run. Its ``gradient_accumulation_steps`` divide the global batch of a step.
        model: Not yet prepared.
        **options: Of NorMuon, beside those of all runs.
    """

    def __init__(self, accelerator, model, **options):
        self.accelerator = accelerator
        self.per_step = accelerator.gradient_accumulation_steps
        ranks = accelerator.num_processes
        loader = DataLoader(examples(), GLOBAL_BATCH // ranks // self.per_step)
        self.model, self.optimizer, self.loader = prepare_normuon(accelerator, model, loader, **{**OPTIONS, **options})
        # A prepared schedule is stepped once per process, unless it is told to go by itself.
        stride = ranks if accelerator.step_scheduler_with_optimizer else 1
        self.scheduler = accelerator.prepare(LambdaLR(self.optimizer, lambda step: cosine(step / stride)))
        self.norms, self.rates = [], []

    def train(self, first=0, last=STEPS):
        """Take the steps from ``first`` to ``last``."""
        loader = self.accelerator.skip_first_batches(self.loader, first * self.per_step) if first else self.loader
        for batch, _ in zip(loader, range((last - first) * self.per_step), strict=False):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(**batch).loss)
                if self.accelerator.sync_gradients:
                    self.norms.append(self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP).item())
                    self.rates.append(self.optimizer.param_groups[0]["lr"])
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self

    def snapshot(self):
        """Return everything that a checkpoint must bring back, whole."""
        state = self.optimizer.optimizer.state
        parameters = named(self.model).items()
        return {
            "weights": whole_weights(self.model),
            "state": {f"{n}.{key}": whole(v) for n, p in parameters if p in state for key, v in state[p].items()},
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups],
            "schedule": self.scheduler.state_dict()["last_epoch"],
        }

    def facts(self):
        """Return what the run ended with, and how its parameters lay."""
        return {
            **self.snapshot(),
            "norms": self.norms,
            "rates": self.rates,
            "is_fsdp2": self.accelerator.is_fsdp2,
            "placements": {str(getattr(p, "placements", "plain")) for p in self.model.parameters()},
            "shared": shares_work(self.optimizer.optimizer),
        }


def resumed(accelerate, folder, half=STEPS // 2):
    """Save in the middle of a run, go on; load into a model of another seed, go on; return every state between.

    Args:
        accelerate: Makes an Accelerator, as at the start of a program.
        folder: For the checkpoint.
        half: Steps before it.
    """
    run = Run(accelerate(), float64_llama()).train(last=half)
    saved = run.snapshot()
    run.accelerator.save_state(str(folder))
    uninterrupted = run.train(half).facts()
    again = Run(accelerate(), tiny_llama(seed=7).double())
    fresh = again.snapshot()
    again.accelerator.load_state(str(folder))
    return {
        "saved": saved,
        "uninterrupted": uninterrupted,
        "fresh": fresh,
        "loaded": again.snapshot(),
        "resumed": again.train(half).facts(),
    }


def one_process(model, **options):
    """The yardstick: no framework, one process, the same global batches, and groups written by hand."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in trained if ".self_attn." in name or ".mlp." in name]
    others = [(name, p) for name, p in trained if not (".self_attn." in name or ".mlp." in name)]
    groups = [{"params": matrices}, {"params": others, "algorithm": "adamw"}]
    optimizer = NorMuon(groups, **{"adjust_lr_fn": "match_progress_adamw", **OPTIONS, **options})
    scheduler = LambdaLR(optimizer, cosine)
    norms, rates = [], []
    for batch in DataLoader(examples(), GLOBAL_BATCH):
        model(**batch).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {"weights": whole_weights(model), "norms": norms, "rates": rates}


def new_head(folder):
    """Load a model without its head, so that it is on the meta device of all ranks but the first; return what moved."""
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    if dist.get_rank() == 0:
        BertForMaskedLM(BertConfig(vocab_size=64, **config)).save_pretrained(folder)
    dist.barrier()
    accelerator = sharding({"cpu_ram_efficient_loading": True})
    model = BertForSequenceClassification.from_pretrained(folder)
    meta = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    model, optimizer = prepare_normuon(accelerator, model, lr=0.1)
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}
    loss = model(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss
    accelerator.backward(loss)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p.to_local())}
    return {"meta": meta, "moved": moved}


def message(kind, call):
    """Return what the error says that ``call`` raises."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def step(accelerator, model, optimizer):
    accelerator.backward(model(**next(iter(DataLoader(examples(), 2)))).loss)
    optimizer.step()


def orders():
    """Build first and prepare afterwards, in every order; return messages, or which weights a step moved."""

    def start(accelerate):
        model = float64_llama()
        return accelerate(), model, build_normuon(model, **OPTIONS)

    def moved(accelerator, model, optimizer):
        before = whole_weights(model)
        step(accelerator, model, optimizer)
        return {name for name, weight in whole_weights(model).items() if not torch.equal(before[name], weight)}

    accelerator, model, optimizer = start(sharding)
    facts = {
        "fsdp2, model": message(ValueError, lambda: accelerator.prepare(model)),
        "fsdp2, optimizer": message(ValueError, lambda: accelerator.prepare(optimizer)),
    }
    optimizer, model = accelerator.prepare(optimizer, model)
    facts["fsdp2, together"] = moved(accelerator, model, optimizer)
    accelerator, model, left = start(sharding)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    facts["fsdp2, another"] = message(RuntimeError, lambda: step(accelerator, model, left))
    accelerator, model, optimizer = start(replicating)
    model = accelerator.prepare(model)
    facts["ddp, apart"] = moved(accelerator, model, accelerator.prepare(optimizer))
    return facts


def refusals():
    """Give prepare_normuon a model that was prepared; return the messages."""

    def refused(accelerator, model):
        return message(ValueError, lambda: prepare_normuon(accelerator, model, lr=0.1))

    facts = {}
    for name, accelerate in (("fsdp2", sharding), ("ddp", replicating)):
        accelerator, model = accelerate(), tiny_llama()
        prepared, _ = prepare_normuon(accelerator, model)
        facts[name] = refused(accelerator, prepared)
        facts[f"{name}, itself"] = refused(accelerator, model)
    facts["wrapped"] = refused(replicating(), DistributedDataParallel(tiny_llama()))
    return facts


def fallback():
    """Ask for FSDP2 on a machine without GPUs, as a program does that knows nothing of it."""
    forget()
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = prepare_normuon(accelerator, tiny_llama())
    return {
        "warning": [str(w.message) for w in caught if w.category is UserWarning],
        "model": type(model).__name__,
    }


def metrics(folder):
    """Log what a step did through Accelerate's own tracker."""
    accelerator = sharding(log_with="tensorboard", project_dir=str(folder))
    accelerator.init_trackers("run")
    model, optimizer = prepare_normuon(accelerator, float64_llama(), **OPTIONS)
    step(accelerator, model, optimizer)
    values = optimizer.optimizer.metrics(synchronize=True)
    accelerator.log(values, step=1)
    for tracker in accelerator.trackers:  # end_training would end the process group, too
        tracker.finish()
    return values


if __name__ == "__main__":
    pretend_gpus()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
