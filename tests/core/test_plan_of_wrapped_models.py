"""What torch wraps around a model or a layer changes names, and no row of the plan."""

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from normuon_plugins import build_normuon, plan_parameters
from normuon_plugins.core.names import unwrapped_name
from tests.models import tiny_llama


def compiled(module):
    return torch.compile(module, backend="eager")  # the other backends import for seconds


def plain(module):
    return module


class Block(nn.Module):
    """A router beside its experts, whole and as a stack of weights, and a hand-written LoRA layer."""

    def __init__(self, wrap):
        super().__init__()
        self.gate = wrap(nn.Linear(8, 4, bias=False))
        self.experts = wrap(nn.ModuleList(wrap(nn.Linear(8, 8)) for _ in range(4)))
        self.lora_A = wrap(nn.Linear(8, 2, bias=False))
        self.lora_B = wrap(nn.Linear(2, 8, bias=False))
        self.qkv = wrap(nn.Linear(8, 24))


class Classifier(nn.Module):
    def __init__(self, wrap=plain):
        super().__init__()
        self.blocks = nn.ModuleList(wrap(Block(wrap)) for _ in range(2))
        self.patch_embed = wrap(nn.Linear(8, 8))
        self.fc = wrap(nn.Linear(8, 10))


def routes(model, **options):
    plan = plan_parameters(model, lora="normuon", **options)
    assert [row.name for row in plan] == [name for name, _ in model.named_parameters()]
    return {unwrapped_name(row.name): (row.layout, row.decay, row.reason) for row in plan}


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper])
def test_the_plan_of_a_wrapped_model_is_that_of_the_model(wrap):
    expected = routes(Classifier())
    assert expected["fc.weight"] == (None, True, "output head")
    assert expected["blocks.0.gate.weight"] == (None, True, "router: one row per expert")
    assert expected["blocks.0.qkv.weight"][0] == "o=8+8+8 i"
    assert expected["blocks.0.lora_B.weight"] == ("o i", True, "LoRA factor B, lora='normuon'")
    assert routes(wrap(Classifier())) == expected
    assert routes(Classifier(wrap)) == expected
    assert routes(checkpoint_wrapper(wrap(Classifier(wrap)))) == expected


# peft 0.21 asks transformers 5.23 by the old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper])
def test_wrapped_layers_of_hugging_face_and_peft_are_what_they_were(wrap):
    def adapted():
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "o_proj"])
        return peft.get_peft_model(tiny_llama(), config)

    model = adapted()
    llama = model.base_model.model.model
    for index, layer in enumerate(llama.layers):
        layer.self_attn.q_proj, layer.self_attn.o_proj = wrap(layer.self_attn.q_proj), wrap(layer.self_attn.o_proj)
        llama.layers[index] = wrap(layer)
    assert routes(model, include_frozen=True) == routes(adapted(), include_frozen=True)
    assert routes(wrap(tiny_llama())) == routes(tiny_llama())


@pytest.mark.parametrize("wrap", [plain, compiled, checkpoint_wrapper])
def test_an_override_that_knows_nothing_of_wrappers_finds_its_parameter(wrap):
    assert routes(wrap(Classifier(wrap)), overrides={r"^fc\.weight$": "o i"})["fc.weight"][0] == "o i"
    model = wrap(Classifier(wrap))
    printed = [name for name, _ in model.named_parameters() if unwrapped_name(name).endswith("gate.weight")]
    found = routes(model, overrides={f"^{printed[0]}$": "o i"})  # as the table writes it
    assert (found["blocks.0.gate.weight"][0], found["blocks.1.gate.weight"][0]) == ("o i", None)


def test_groups_keep_the_names_of_the_model_that_was_given():
    model = compiled(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    names = [name for group in build_normuon(model).param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert names[0] == "_orig_mod.0.weight"
