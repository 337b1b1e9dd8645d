"""PEFT in the Trainer of transformers: LoRA policies, modules_to_save, DoRA, bfloat16, resume, adapters on disk."""

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from normuon_plugins import NorMuon
from normuon_plugins.hf_trainer import register_normuon, unregister_normuon
from tests.adapters.training import weights
from tests.adapters.trl_runs import SAVED_AT, lora, names_by_algorithm, options, trained
from tests.models import max_difference, tiny_llama, token_blocks

pytestmark = [
    # peft 0.21 asks transformers 5.23 by the old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # ours, of the default policy; one test expects it
    pytest.mark.filterwarnings("ignore:every trainable matrix belongs to an adapter"),
]

# Name -> policy, what LoraConfig says, what TrainingArguments says, dtype of the base.
CASES = {
    "adamw": ("adamw", {}, {}, torch.float32),
    "normuon": ("normuon", {}, {}, torch.float32),
    "b": ("b", {}, {}, torch.float32),
    "normuon, bf16": ("normuon", {}, {"bf16": True}, torch.float32),
    "b, bfloat16 base": ("b", {}, {}, torch.bfloat16),
    "b, DoRA, modules_to_save": ("b", {"use_dora": True, "modules_to_save": ["lm_head", "o_proj"]}, {}, torch.float32),
}
# By hand: part of a name -> algorithm under each policy. Whatever the policy, copies are planned like the modules that
# they stand for, and the magnitudes of DoRA are vectors.
FACTORS = {
    "adamw": {"lora_A": "adamw", "lora_B": "adamw"},
    "normuon": {"lora_A": "normuon", "lora_B": "normuon"},
    "b": {"lora_A": "adamw", "lora_B": "normuon"},
}
OTHERS = {
    "lora_magnitude_vector": "adamw",
    "lm_head.modules_to_save": "adamw",
    "o_proj.modules_to_save": "normuon",
}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register_normuon()
    yield
    unregister_normuon()


def adapted(dtype=torch.float32, seed=0, **changes):
    """tiny_llama with adapters that begin elsewhere for another seed; the base is the same."""
    model = tiny_llama().to(dtype)
    torch.manual_seed(seed)
    return peft.get_peft_model(model, lora(**changes))


def make_trainer(folder, model, policy, **changes):
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT}
    arguments = TrainingArguments(**options(folder, optim_args=f"lora={policy}", **saving, **changes))
    return Trainer(model=model, args=arguments, train_dataset=token_blocks(16))


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory):
    """A finished run, and the weights after it was resumed in the middle, from adapters that began elsewhere."""
    folder = tmp_path_factory.mktemp("run")
    policy, changes, arguments, dtype = CASES[request.param]
    trainer = make_trainer(folder, adapted(dtype, **changes), policy, **arguments)
    moved = trained(trainer)
    trainer.save_model(folder / "adapter")
    resumed = make_trainer(folder, adapted(dtype, seed=7, **changes), policy, **arguments)
    trained(resumed, resume=folder / f"checkpoint-{SAVED_AT}")
    return {
        "policy": policy,
        "dtype": dtype,
        "trainer": trainer,
        "moved": moved,
        "resumed": weights(resumed.model),
        "folder": folder / "adapter",
    }


def test_the_policy_decides_about_the_factors_and_the_rules_about_the_rest(run):
    optimizer = run["trainer"].optimizer.optimizer
    assert isinstance(optimizer, NorMuon)
    expected = {**FACTORS[run["policy"]], **OTHERS}
    for algorithm, names in names_by_algorithm(optimizer).items():
        for name in names:
            (part,) = [part for part in expected if f".{part}." in name]
            assert expected[part] == algorithm, name


def test_all_that_is_trainable_moves_and_nothing_else(run):
    trainable = {name for name, p in run["trainer"].model.named_parameters() if p.requires_grad}
    assert run["moved"] == trainable


def test_adapters_and_state_are_float32_whatever_the_base(run):
    dtypes = {p.dtype for p in run["trainer"].model.parameters() if p.requires_grad}
    dtypes |= {v.dtype for state in run["trainer"].optimizer.optimizer.state.values() for v in state.values()}
    assert dtypes == {torch.float32}
    assert run["trainer"].model.base_model.model.model.embed_tokens.weight.dtype == run["dtype"]


def test_resumed_run_equals_the_uninterrupted_one(run):
    assert max_difference(run["resumed"], weights(run["trainer"].model)) == 0


def test_the_saved_adapter_is_the_trained_one(run):
    loaded = peft.PeftModel.from_pretrained(tiny_llama().to(run["dtype"]), run["folder"])
    assert max_difference(weights(loaded), weights(run["trainer"].model)) == 0


def test_merged_the_adapter_computes_what_it_computed_in_training(tmp_path):
    trainer = make_trainer(tmp_path, adapted(torch.float64), "normuon")
    trained(trainer)
    tokens = token_blocks(2)[0]["input_ids"][None]
    trainer.model.eval()
    with torch.no_grad():
        before = trainer.model(input_ids=tokens).logits
        after = trainer.model.merge_and_unload()(input_ids=tokens).logits
        untrained = tiny_llama().double()(input_ids=tokens).logits
    torch.testing.assert_close(before, after)
    assert (after - untrained).abs().max() > 1e-4


def test_the_default_policy_warns_that_nothing_is_on_normuon(tmp_path):
    trainer = Trainer(adapted(), TrainingArguments(**options(tmp_path)), train_dataset=token_blocks(4))
    with pytest.warns(UserWarning, match=r"nothing is on NorMuon\. lora='normuon' or lora='b'"):
        trainer.create_optimizer()


def test_adapters_of_an_embedding_alone_train_on_adamw_and_a_policy_that_asks_for_normuon_is_told(tmp_path):
    trainer = make_trainer(tmp_path, adapted(target_modules=["embed_tokens"]), "normuon")
    with pytest.warns(UserWarning, match=r"There is no matrix for NorMuon: all 2 .* of an embedding"):
        trainer.create_optimizer()


def test_a_checkpoint_of_another_policy_is_refused(tmp_path):
    trained(make_trainer(tmp_path, adapted(), "normuon"))
    other = make_trainer(tmp_path, adapted(), "b")
    with pytest.raises(ValueError, match="lora_A"):
        trained(other, resume=tmp_path / f"checkpoint-{SAVED_AT}")
