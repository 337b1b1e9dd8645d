"""Those who want a class: Trainer subclasses that group parameters, PEFT's LoRA+, Sentence Transformers, class paths.

What a parameter gets is compared with what the same code gives it with ``optim="adamw_torch"``.
"""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import get_parameter_names

from normuon_plugins import NorMuon, plan_parameters
from normuon_plugins.hf_trainer import NorMuonFactory, register_normuon, unregister_normuon
from tests.adapters.training import examples, trainer_arguments, trainer_options, weights
from tests.models import tiny_llama

BOTH_DECAYS = "adamw_weight_decay=0.1"


@pytest.fixture(autouse=True)
def _registered():
    register_normuon()
    yield
    unregister_normuon()


def trainer_of(kind, folder, optim, model=None, **changes):
    changes |= {"optim": optim} if optim == "normuon" else {"optim": optim, "optim_args": None}
    arguments = trainer_arguments(folder, **{"optim_args": None, **changes})
    return kind(model=model or tiny_llama(), args=arguments, train_dataset=examples())


def by_name(trainer, key):
    """Return name -> what the parameter's group says of ``key``."""
    values = {id(p): group[key] for group in trainer.optimizer.param_groups for p in group["params"]}
    return {name: values[id(p)] for name, p in trainer.model.named_parameters() if id(p) in values}


def train(trainer):
    """Train, and return the names of the parameters that moved."""
    before = weights(trainer.model)
    trainer.train()
    return {name for name, after in weights(trainer.model).items() if not torch.equal(after, before[name])}


class Halves(Trainer):
    """The lower layer has a rate of its own; all parameters are given, with decay as in many training scripts."""

    how = "named"

    def create_optimizer(self, model=None):
        if self.how == "named":
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        elif self.how == "unnamed":
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args)
        else:  # a class by its path, with options of its own
            kind = torch.optim.AdamW if "adamw" in self.args.optim else NorMuonFactory
            options = {"lr": self.args.learning_rate}
        lower = [p for name, p in self.model.named_parameters() if "layers.0." in name]
        upper = [p for name, p in self.model.named_parameters() if "layers.0." not in name]
        groups = [{"params": lower, "lr": 1e-4, "weight_decay": 0.1}, {"params": upper, "weight_decay": 0.0}]
        self.optimizer = kind(groups, **options)
        return self.optimizer


@pytest.mark.parametrize("how", ["named", "unnamed", "class"])
def test_groups_of_a_subclass_keep_their_rates_and_decays(tmp_path, monkeypatch, how):
    monkeypatch.setattr(Halves, "how", how)
    ours, theirs = (trainer_of(Halves, tmp_path, optim) for optim in ("normuon", "adamw_torch"))
    moved = [train(trainer) for trainer in (ours, theirs)]
    assert moved[0] == moved[1] == set(weights(ours.model))
    for key in ("initial_lr", "weight_decay"):
        assert by_name(ours, key) == by_name(theirs, key)
    routes = {row.name: row.algorithm for row in plan_parameters(ours.model)}
    assert by_name(ours, "algorithm") == routes


def test_a_run_with_groups_is_resumed_bit_by_bit(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(Halves, tmp_path, "normuon", **changes)
    whole.train()
    resumed = trainer_of(Halves, tmp_path, "normuon", tiny_llama(7), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, weight in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], weight)


class LoraPlus(Trainer):
    def create_optimizer(self, model=None):
        from peft.optimizers import create_loraplus_optimizer

        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = create_loraplus_optimizer(self.model, kind, loraplus_lr_ratio=16, **options)
        return self.optimizer


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_loraplus_of_peft_gives_the_b_factors_their_rate(tmp_path):
    from peft import LoraConfig, get_peft_model

    def run(optim, optim_args=None):
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
        trainer = trainer_of(LoraPlus, tmp_path, optim, model, weight_decay=0.0, optim_args=optim_args)
        return trainer, train(trainer)

    ours, moved = run("normuon", "lora=b")
    theirs, expected = run("adamw_torch")
    assert moved == expected
    for key in ("initial_lr", "weight_decay"):
        assert by_name(ours, key) == by_name(theirs, key)
    assert {name for name, kind in by_name(ours, "algorithm").items() if kind == "normuon"} == {
        name for name in moved if "q_proj.lora_B" in name
    }


class Spared(Trainer):
    """Decays no value projection, but every norm."""

    def get_decay_parameter_names(self, model):
        norms = [name for name, _ in model.named_parameters() if "norm" in name]
        return [name for name in super().get_decay_parameter_names(model) if "v_proj" not in name] + norms


@pytest.mark.parametrize("how", ["optim", "factory"])
def test_decay_that_a_subclass_decides_is_the_subclass_s(tmp_path, how):
    theirs = trainer_of(Spared, tmp_path, "adamw_torch")
    theirs.create_optimizer()
    ours = trainer_of(Spared, tmp_path, "normuon", optim_args=BOTH_DECAYS)
    if how == "factory":
        options = {"lr": 0.01, "weight_decay": 0.1, "adamw_weight_decay": 0.1}
        ours.optimizer_cls_and_kwargs = (NorMuonFactory, options)
    ours.create_optimizer()
    assert by_name(ours, "weight_decay") == by_name(theirs, "weight_decay")
    stock = trainer_of(Trainer, tmp_path, "normuon")
    stock.create_optimizer()
    assert by_name(ours, "lr") == by_name(stock, "lr")


def test_only_what_the_subclass_changes_counts(tmp_path):
    """The stock Trainer decays embeddings and heads, ours by adamw_weight_decay: that is not the subclass."""
    ours, stock = trainer_of(Spared, tmp_path, "normuon"), trainer_of(Trainer, tmp_path, "normuon")
    for trainer in (ours, stock):
        trainer.create_optimizer()
    changed = {name for name, _ in ours.model.named_parameters() if "norm" in name or "v_proj" in name}
    expected = {**by_name(stock, "weight_decay"), **dict.fromkeys(changed, 0.1)}
    expected |= {name: 0.0 for name in changed if "v_proj" in name}
    assert by_name(ours, "weight_decay") == expected


def test_a_subclass_that_decides_as_the_trainer_does_changes_no_group(tmp_path):
    class Same(Trainer):
        def get_decay_parameter_names(self, model):
            forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
            return get_parameter_names(model, [nn.LayerNorm], forbidden)

    trainer = trainer_of(Same, tmp_path, "normuon")
    assert [g["name"] for g in trainer.create_optimizer().param_groups] == ["normuon_o_i", "adamw", "adamw_no_decay"]


@pytest.mark.parametrize("key", ["params", "optimizer_dict"])
def test_groups_among_the_options_are_taken_as_the_trainer_takes_them(tmp_path, key):
    class WithGroups(Trainer):
        def get_optimizer_cls_and_kwargs(self, args, model=None):
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
            head = [{"params": [model.lm_head.weight], "lr": 0.5}, {"params": model.model.parameters()}]
            return kind, {**options, key: head}

    ours, theirs = (trainer_of(WithGroups, tmp_path, optim) for optim in ("normuon", "adamw_torch"))
    for trainer in (ours, theirs):
        trainer.create_optimizer()
    assert by_name(ours, "lr") == by_name(theirs, "lr")


def test_without_a_trainer_the_model_is_named_or_asked_for():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"knows no model.*name it: NorMuonFactory\(groups, model=model"):
        NorMuonFactory(model.parameters(), lr=0.1)
    for optimizer in (NorMuonFactory(model.parameters(), model=model, lr=0.1), NorMuonFactory(model, lr=0.1)):
        assert isinstance(optimizer, NorMuon)
        assert [group["name"] for group in optimizer.param_groups] == ["normuon_o_i", "adamw", "adamw_no_decay"]
    with pytest.raises(TypeError, match=r"got \['lr'\] and no parameters"):
        NorMuonFactory(lr=0.1)


def test_frozen_parameters_are_left_out_as_from_the_trainer_s_own_adamw(tmp_path):
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    ours, theirs = (trainer_of(Trainer, tmp_path, optim, model) for optim in ("normuon", "adamw_torch"))
    for trainer in (ours, theirs):
        trainer.create_optimizer()
    assert by_name(ours, "lr").keys() == by_name(theirs, "lr").keys()


def test_a_class_that_knows_the_model_looks_like_one_and_lets_the_model_go(tmp_path):
    model = tiny_llama()
    kind, _ = Trainer.get_optimizer_cls_and_kwargs(trainer_arguments(tmp_path), model)
    assert kind.__name__ == "NorMuonFactory"  # PEFT and many scripts compare it
    known = weakref.ref(model)
    gc.disable()
    try:
        del model, kind
        assert known() is None
    finally:
        gc.enable()


@pytest.fixture
def sentences():
    """A Sentence Transformers trainer by optim: embeddings, two dense layers, and a loss with a classifier."""
    pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.losses import SoftmaxLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, WordEmbeddings
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    words = [f"w{number}" for number in range(16)]
    pairs = {"a": words, "b": words[::-1], "label": [number % 3 for number in range(16)]}

    def build(folder, optim, **changes):
        torch.manual_seed(0)
        embeddings = WordEmbeddings(WhitespaceTokenizer(words), torch.randn(16, 8), update_embeddings=True)
        model = SentenceTransformer(modules=[embeddings, Pooling(8), Dense(8, 12), Dense(12, 8)], device="cpu")
        options = trainer_options(folder, optim=optim, max_steps=2, **changes)
        del options["train_sampling_strategy"]
        return SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(**options),
            train_dataset=Dataset.from_dict(pairs),
            loss=SoftmaxLoss(model, 8, 3),
        )

    return build


@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers_hands_over_the_groups_of_its_loss(tmp_path, sentences):
    changes = {"learning_rate_mapping": {r"2\.linear": 1e-3}}
    ours, theirs = (sentences(tmp_path, optim, **changes) for optim in ("normuon", "adamw_torch"))
    found = []
    for trainer in (ours, theirs):
        before = {name: p.detach().clone() for name, p in trainer.loss.named_parameters()}
        trainer.train()
        groups = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
        named = list(trainer.loss.named_parameters())
        assert all(not torch.equal(p, before[name]) for name, p in named)
        found.append({name: (groups[id(p)]["initial_lr"], groups[id(p)]["weight_decay"]) for name, p in named})
    assert found[0] == found[1]
    matrices = {n for g in ours.optimizer.param_groups if g["algorithm"] == "normuon" for n in g["param_names"]}
    assert matrices == {"model.2.linear.weight", "model.3.linear.weight"}
