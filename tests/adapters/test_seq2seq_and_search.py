"""Seq2SeqTrainer on T5 and BART, and Trainer.hyperparameter_search with optuna."""

import optuna
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from normuon_plugins import NorMuon
from normuon_plugins.hf_trainer import register_normuon, unregister_normuon
from tests.adapters.training import weights
from tests.adapters.trl_runs import SAVED_AT, names_by_algorithm, options, trained
from tests.models import VOCABULARY, max_difference, tiny_llama, token_blocks


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register_normuon()
    yield
    unregister_normuon()


def tiny_t5(seed=0):
    """Relative position tables, gated MLP, and one table for encoder, decoder and head."""
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=VOCABULARY, **sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def tiny_bart(seed=0):
    """Learned positions, biases everywhere, and one table for encoder, decoder and head."""
    torch.manual_seed(seed)
    halves = {
        f"{half}_{key}": value
        for half in ("encoder", "decoder")
        for key, value in {"layers": 1, "attention_heads": 4, "ffn_dim": 48}.items()
    }
    config = BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=32, **halves)
    return BartForConditionalGeneration(config)


# Model -> how many matrices it has, and how their names end; and the tables, which are embeddings.
MODELS = {
    "t5": (
        tiny_t5,
        18,
        (".q", ".k", ".v", ".o", ".wi_0", ".wi_1", ".wo"),
        {
            "shared.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        },
    ),
    "bart": (
        tiny_bart,
        16,
        ("_proj", ".fc1", ".fc2"),
        {"model.shared.weight", "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"},
    ),
}


def make_seq2seq(folder, model):
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"][:8]} for row in token_blocks(20)]
    generating = {"predict_with_generate": True, "generation_max_length": 6, "generation_num_beams": 2}
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT, "eval_strategy": "steps", "eval_steps": SAVED_AT}
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**options(folder, **generating, **saving)),
        train_dataset=data[:16],
        eval_dataset=data[16:],
        compute_metrics=lambda prediction: {"generated": prediction.predictions.shape[0]},
    )


@pytest.fixture(scope="module", params=MODELS)
def seq2seq(request, tmp_path_factory):
    """A finished run, and the weights after it was resumed in the middle by another model."""
    folder = tmp_path_factory.mktemp(request.param)
    make, matrices, ends, tables = MODELS[request.param]
    trainer = make_seq2seq(folder, make())
    moved = trained(trainer)
    resumed = make_seq2seq(folder, make(seed=7))
    trained(resumed, resume=folder / f"checkpoint-{SAVED_AT}")
    return {
        "trainer": trainer,
        "moved": moved,
        "resumed": weights(resumed.model),
        "matrices": matrices,
        "ends": tuple(f"{end}.weight" for end in ends),
        "tables": tables,
    }


def test_the_projections_of_encoder_and_decoder_are_on_normuon(seq2seq):
    optimizer = seq2seq["trainer"].optimizer.optimizer
    assert isinstance(optimizer, NorMuon)
    names = weights(seq2seq["trainer"].model)
    expected = {name for name in names if name.endswith(seq2seq["ends"])}
    assert len(expected) == seq2seq["matrices"]
    assert names_by_algorithm(optimizer)["normuon"] == expected


def test_word_and_position_tables_are_on_adamw_and_tied_ones_are_there_once(seq2seq):
    optimizer = seq2seq["trainer"].optimizer.optimizer
    tables = [
        name
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if group["algorithm"] == "adamw" and parameter.ndim == 2
    ]
    assert sorted(tables) == sorted(seq2seq["tables"])


def test_every_weight_moves(seq2seq):
    assert seq2seq["moved"] == set(weights(seq2seq["trainer"].model))


def test_resumed_run_equals_the_uninterrupted_one(seq2seq):
    assert max_difference(seq2seq["resumed"], weights(seq2seq["trainer"].model)) == 0


def test_evaluation_generates_in_the_middle_of_training(seq2seq):
    found = [entry["eval_generated"] for entry in seq2seq["trainer"].state.log_history if "eval_generated" in entry]
    assert found == [4, 4]


# Hyperparameter search


class Watch(TrainerCallback):
    """What each trial began and ended with."""

    def __init__(self):
        self.trials = []

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        inner = optimizer.optimizer
        self.trials.append(
            {
                "optimizer": inner,
                "entries of state": len(inner.state),
                "groups": {group["algorithm"]: dict(group) for group in inner.param_groups},
                "arguments": {key: getattr(args, key) for key in ("learning_rate", "weight_decay", "optim_args")},
            }
        )

    def on_train_end(self, args, state, control, model=None, **_):
        self.trials[-1]["weights"] = weights(model)


def make_searched(folder, callbacks=(), **changes):
    return Trainer(
        model_init=lambda: tiny_llama(),
        args=TrainingArguments(**options(folder, max_steps=2, **changes)),
        train_dataset=token_blocks(8),
        eval_dataset=token_blocks(4),
        callbacks=[*callbacks],
    )


def space(trial):
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 0.0, 0.2),
        "optim_args": trial.suggest_categorical("optim_args", ["momentum=0.9,adamw_lr=1e-3", "momentum=0.8"]),
    }


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """Two trials, and the best run that they found."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    watch = Watch()
    trainer = make_searched(tmp_path_factory.mktemp("search"), [watch])
    sampler = optuna.samplers.RandomSampler(seed=0)
    best = trainer.hyperparameter_search(space, n_trials=2, direction="minimize", backend="optuna", sampler=sampler)
    return watch.trials, best


def test_every_trial_builds_a_fresh_normuon(search):
    first, second = search[0]
    assert isinstance(first["optimizer"], NorMuon)
    assert isinstance(second["optimizer"], NorMuon)
    assert first["optimizer"] is not second["optimizer"]
    assert [trial["entries of state"] for trial in search[0]] == [0, 0]


def test_every_trial_has_the_rate_the_decay_and_the_options_of_its_own(search):
    for trial in search[0]:
        arguments, groups = trial["arguments"], trial["groups"]
        assert groups["normuon"]["initial_lr"] == arguments["learning_rate"]
        assert groups["normuon"]["weight_decay"] == arguments["weight_decay"]
        first_words = arguments["optim_args"].startswith("momentum=0.9,")
        assert groups["normuon"]["momentum"] == (0.9 if first_words else 0.8)
        assert groups["adamw"]["initial_lr"] == (1e-3 if first_words else arguments["learning_rate"])
    first, second = (trial["arguments"] for trial in search[0])
    assert all(first[key] != second[key] for key in first)


def test_a_trial_after_another_equals_a_run_with_its_arguments_alone(search, tmp_path):
    last = search[0][-1]
    alone = make_searched(tmp_path, **last["arguments"])
    alone.train()
    assert max_difference(weights(alone.model), last["weights"]) == 0


def rates(trial):
    """The space that docs/tuning.md shows: both learning rates on a logarithmic scale."""
    adamw_lr = trial.suggest_float("adamw_lr", 1e-4, 1e-1, log=True)
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        "optim_args": f"adamw_lr={adamw_lr}",
    }


def test_the_search_goes_over_both_rates_and_names_those_of_the_smallest_loss(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    watch, losses = Watch(), []
    trainer = make_searched(tmp_path, [watch])

    def objective(metrics):
        losses.append(metrics["eval_loss"])
        return losses[-1]

    sampler = optuna.samplers.RandomSampler(seed=0)
    best = trainer.hyperparameter_search(
        rates, n_trials=3, direction="minimize", backend="optuna", sampler=sampler, compute_objective=objective
    )
    peaks = [
        {"learning_rate": trial["groups"]["normuon"]["initial_lr"], "adamw_lr": trial["groups"]["adamw"]["initial_lr"]}
        for trial in watch.trials
    ]
    assert len({tuple(peak.values()) for peak in peaks}) == 3
    assert best.hyperparameters == pytest.approx(peaks[losses.index(min(losses))])


def test_the_best_run_names_arguments_of_a_trial(search):
    trials, best = search
    assert best.hyperparameters in [trial["arguments"] for trial in trials]
