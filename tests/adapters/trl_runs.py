"""Tiny tokenizer, data sets and trainers for TRL and PEFT, and what two processes report of them."""

from pathlib import Path

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from tests import documentation
from tests.adapters.training import shares_work, trainer_options, weights
from tests.models import VOCABULARY, max_difference, tiny_llama, token_blocks

STEPS = 4
SAVED_AT = 2
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 3))]
# Names of the matrices of tiny_llama, under whatever wrapper.
HIDDEN = (".q_proj.", ".k_proj.", ".v_proj.", ".o_proj.", ".gate_proj.", ".up_proj.", ".down_proj.")
FLOAT64 = {"optim_args": "adamw_lr=0.003,ns_dtype=float64", "bf16": False, "lr_scheduler_type": "constant"}


def word_tokenizer():
    """One token per word, as many as tiny_llama has."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sentences(count, length, seed):
    numbers = torch.randint(0, VOCABULARY - 3, (count, length), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{number}" for number in row) for row in numbers.tolist()]


def text_dataset(count=16):
    return Dataset.from_dict({"text": sentences(count, 10, seed=1)})


def prompt_dataset(count=16):
    return Dataset.from_dict({"prompt": sentences(count, 4, seed=2)})


def preference_dataset(count=16):
    """Prompts with an answer that was chosen and one that was not, each begun by the space that divides it."""
    answers = {
        name: [f" {sentence}" for sentence in sentences(count, 5, seed)]
        for name, seed in (("chosen", 3), ("rejected", 4))
    }
    return Dataset.from_dict({"prompt": sentences(count, 4, seed=2), **answers})


def labeled_dataset(count=16):
    """Prompts with an answer that is good or not."""
    rows = preference_dataset(count)
    labels = [bool(index % 2) for index in range(count)]
    return Dataset.from_dict({"prompt": rows["prompt"][:], "completion": rows["chosen"][:], "label": labels})


def reward_model(seed=0):
    config = tiny_llama().config
    config.num_labels = 1
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config)


def count_words(completions, **_):
    """Reward completions of many different words."""
    return [float(len(set(completion.split()))) for completion in completions]


def options(folder, **changes):
    """Of every trainer here; no two of its runs write to one folder unless they resume."""
    return trainer_options(folder, **{"max_steps": STEPS, **changes})


# kind -> trainer, config, what its constructor needs besides the model, what the config needs.
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, lambda: {"train_dataset": text_dataset()}, {}),
    "dpo": (DPOTrainer, DPOConfig, lambda: {"train_dataset": preference_dataset()}, {}),
    "reward": (RewardTrainer, RewardConfig, lambda: {"train_dataset": preference_dataset()}, {}),
    "kto": (KTOTrainer, KTOConfig, lambda: {"train_dataset": labeled_dataset(), "ref_model": tiny_llama()}, {}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        lambda: {"train_dataset": prompt_dataset(), "reward_funcs": count_words},
        {"num_generations": 2, "max_completion_length": 4},
    ),
    "rloo": (
        RLOOTrainer,
        RLOOConfig,
        lambda: {"train_dataset": prompt_dataset(), "reward_funcs": count_words},
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.0},  # no reference model
    ),
    "distillation": (
        DistillationTrainer,
        DistillationConfig,
        lambda: {"train_dataset": prompt_dataset(), "teacher_model": tiny_llama(seed=3)},
        {"max_completion_length": 4},
    ),
}


def make_trainer(kind, folder, model=None, *, changes=None, **arguments):
    """Return the trainer of TRL for ``kind``, with tiny data.

    Args:
        kind: A key of ``TRAINERS``.
        folder: Where it writes.
        model: In place of tiny_llama, or of a reward model like it.
        changes: Of its config.
        **arguments: Of the trainer.
    """
    trainer, config, needed, needed_by_config = TRAINERS[kind]
    arguments = {**needed(), "processing_class": word_tokenizer(), **arguments}
    if kind == "dpo" and "peft_config" not in arguments:  # with an adapter, the model below it is the reference
        arguments["ref_model"] = tiny_llama()
    if model is None:
        model = reward_model() if kind == "reward" else tiny_llama()
    return trainer(model=model, args=config(**options(folder, **needed_by_config, **(changes or {}))), **arguments)


def lora(**changes):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **changes})


def names_by_algorithm(optimizer):
    """Return algorithm -> names of its parameters."""
    found = {"normuon": set(), "adamw": set()}
    for group in optimizer.param_groups:
        found[group["algorithm"]] |= set(group["param_names"])
    return found


def trained(trainer, resume=None):
    """Train, and return the names of the parameters that moved."""
    before = weights(trainer.model)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return {name for name, weight in weights(trainer.model).items() if not weight.equal(before[name])}


def two_processes(folder):
    """Train on the processes that call it; see tests/ranks.py. Returns case -> what this process saw."""
    from normuon_plugins.hf_trainer import register_normuon

    register_normuon()
    ranks = torch.distributed.get_world_size()
    share = {"per_device_train_batch_size": 4 // ranks}
    saved = {"save_strategy": "steps", "save_steps": SAVED_AT, "optim_args": FLOAT64["optim_args"] + ",lora=normuon"}
    runs = {
        "sft": ("sft", tiny_llama().double(), FLOAT64 | share, {}),
        "lora": ("sft", tiny_llama().double(), FLOAT64 | share | saved, {"peft_config": lora()}),
        "dpo": ("dpo", tiny_llama(), share, {}),
        "grpo": ("grpo", tiny_llama(), share, {}),
    }
    seen = {}
    for case, (kind, model, changes, arguments) in runs.items():
        trainer = make_trainer(kind, f"{folder}/{case}", model, changes=changes, **arguments)
        assert trainer.args.world_size == ranks
        moved = trained(trainer)
        seen[case] = {
            "weights": weights(trainer.model),
            "moved": moved,
            "shares work": shares_work(trainer.optimizer.optimizer),
        }
    kind, _, changes, _ = runs["lora"]
    resumed = make_trainer(
        kind, f"{folder}/lora", tiny_llama().double(), changes=changes | {"seed": 7}, peft_config=lora()
    )
    resumed.train(resume_from_checkpoint=f"{folder}/lora/checkpoint-{SAVED_AT}")
    seen["lora"]["resumed"] = max_difference(weights(resumed.model), seen["lora"]["weights"])
    return seen


def documented_names(folder):
    """Return the names that the code of docs/trl.md begins with; ``folder`` holds the model, and is not left."""
    tiny_llama().save_pretrained(Path(folder) / "model")
    return {
        "model": AutoModelForCausalLM.from_pretrained(Path(folder) / "model"),
        "tokenizer": word_tokenizer(),
        "text_dataset": text_dataset(),
        "preference_dataset": preference_dataset(),
        "prompt_dataset": prompt_dataset(),
        "dataset": token_blocks(8),
    }


def documented_files(page, folder):
    """Write what the commands of docs/trl.md read: the YAML as printed, and what it names on the hub."""
    (text,) = [code for language, code in documentation.blocks(page) if language == "yaml"]
    (Path(folder) / "sft.yaml").write_text(text)
    named = yaml.safe_load(text)
    for saved in (tiny_llama(), word_tokenizer()):
        saved.save_pretrained(Path(folder) / named["model_name_or_path"])
    (Path(folder) / named["dataset_name"]).mkdir(parents=True)
    text_dataset().to_json(Path(folder) / named["dataset_name"] / "train.jsonl")
