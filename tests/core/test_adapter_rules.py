"""Adapters: what real PEFT models train, on which rule each of it goes, and that the base under it stays as it was."""

import re

import peft
import pytest
import torch
import transformers
from torch import nn
from torchao.float8.float8_training_tensor import LinearMMConfig
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_

from normuon_plugins import NorMuon, build_normuon, plan_parameters
from normuon_plugins.core.adapter_rules import LORA_POLICIES, adapted_weight, adapter_decision
from normuon_plugins.core.layout import parse_layout
from normuon_plugins.core.model_facts import ModelFacts
from normuon_plugins.core.quantized import is_quantized
from tests.models import max_difference, tiny_llama, token_blocks

pytestmark = [
    # peft 0.21 asks transformers 5.23 by the old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # of no concern to a test that never merges
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"),
    # peft says so of every norm, which is what its LN tuning is for
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
    # ours, of models that train nothing but adapters; one test expects it
    pytest.mark.filterwarnings("ignore:every trainable matrix belongs to an adapter"),
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without `get_apply_tensor_subclass`"),
]

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
Q_PROJ = {"target_modules": ["q_proj"]}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
ADAMW, VECTOR = (None, True), (None, False)


def decisions(model, policy="normuon"):
    """Return name -> decision of every trainable parameter, None where it is no adapter."""
    facts = ModelFacts(model)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            answers = [adapter_decision(owner, parameter, policy) for owner in facts.owners[parameter]]
            found[name] = next((answer for answer in answers if answer is not None), None)
    return found


def routes(model, policy="normuon"):
    """Return what follows the adapted module in each name -> (layout, decay), the same in every layer."""
    found = {}
    for name, decision in decisions(model, policy).items():
        assert decision is not None, name
        route = (decision.layout, decision.decay)
        assert found.setdefault(re.sub(r"^base_model.*(q_proj|fc|self_attn|embed_tokens)\.", "", name), route) == route
    return found


def lora(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, **Q_PROJ, **options}))


# Tuner, its options, and by hand: what it trains of one adapted layer -> (layout, decay) under lora="normuon".
TUNERS = {
    "LoRA": ("LoraConfig", {"r": 4}, {"lora_A.default.weight": ("o i", True), "lora_B.default.weight": ("o i", True)}),
    "rsLoRA": (
        "LoraConfig",
        {"r": 4, "use_rslora": True},
        {"lora_A.default.weight": ("o i", True), "lora_B.default.weight": ("o i", True)},
    ),
    "DoRA": (
        "LoraConfig",
        {"r": 4, "use_dora": True},
        {
            "lora_A.default.weight": ("o i", True),
            "lora_B.default.weight": ("o i", True),
            "lora_magnitude_vector.default.weight": VECTOR,
        },
    ),
    # the other factor is there, but frozen
    "MiCA": ("LoraConfig", {"r": 4, "init_lora_weights": "mica"}, {"lora_A.default.weight": ("o i", True)}),
    "KaSA": (
        "LoraConfig",
        {"r": 4, "kasa_config": peft.KasaConfig()},
        {"lora_A.default.weight": ("o i", True), "lora_B.default.weight": ("o i", True), "lora_diag.default": VECTOR},
    ),
    "BD-LoRA": (
        "LoraConfig",
        {"r": 4, "use_bdlora": peft.BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2)},
        {"lora_A.default.weight": ("o i", True), "lora_B.default.weight": ("o=16*2 i", True)},
    ),
    "AdaLoRA": (
        "AdaLoraConfig",
        {"init_r": 4, "total_step": 10},
        {"lora_A.default": ("o i", True), "lora_B.default": ("o i", True), "lora_E.default": VECTOR},
    ),
    "DeLoRA": (
        "DeloraConfig",
        {"r": 4},
        {"delora_A.default": ("o i", True), "delora_B.default": ("o i", True), "delora_lambda.default": VECTOR},
    ),
    "GraLoRA": (
        "GraloraConfig",
        {"r": 4, "gralora_k": 2, "hybrid_r": 2},
        {
            "gralora_A.default": ("e i o", True),
            "gralora_B.default": ("e i o", True),
            "gralora_A_general.default.weight": ("o i", True),
            "gralora_B_general.default.weight": ("o i", True),
        },
    ),
    "Supra": (
        "SupertuningConfig",
        {"r": 4},
        {
            "supertuning_values.default": VECTOR,
            "supertuning_lora_A.default.weight": ("o i", True),
            "supertuning_lora_B.default.weight": ("o i", True),
        },
    ),
    "VeRA": ("VeraConfig", {"r": 4}, {"vera_lambda_b.default": VECTOR, "vera_lambda_d.default": VECTOR}),
    "PVeRA": ("PveraConfig", {"r": 4}, {"pvera_lambda_b.default": VECTOR, "pvera_lambda_d.default": VECTOR}),
    "VB-LoRA": (
        "VBLoRAConfig",
        {"r": 4, "vector_length": 16, "num_vectors": 8},
        {"vblora_logits_A.default": ADAMW, "vblora_logits_B.default": ADAMW, "vblora_vector_bank.default": ADAMW},
    ),
    "TinyLoRA": ("TinyLoraConfig", {}, {"tinylora_v.default.0": VECTOR, "tinylora_v.default.1": VECTOR}),
    "Uni-LoRA": ("UniLoraConfig", {}, {"unilora_theta_d.default": VECTOR}),
    "RandLoRA": ("RandLoraConfig", {"r": 4}, {"randlora_lambda.default": ADAMW, "randlora_gamma.default": ADAMW}),
    "HiRA": ("HiraConfig", {"r": 4}, {"hira_A.default": ADAMW, "hira_B.default": ADAMW}),
    "Lily": (
        "LilyConfig",
        {"r": 4},
        {"lily_A.default.weight": ADAMW, "lily_B.default.weight": ADAMW, "lily_router.default.weight": ADAMW},
    ),
    "LoHa": (
        "LoHaConfig",
        {"r": 4},
        {f"hada_w{pair}_{side}.default": ADAMW for pair in (1, 2) for side in "ab"},
    ),
    "LoKr": (
        "LoKrConfig",
        {"r": 2, "decompose_factor": 4},
        {"lokr_w1.default": ADAMW, "lokr_w2_a.default": ADAMW, "lokr_w2_b.default": ADAMW},
    ),
    "GLoRA": (
        "GloraConfig",
        {},
        {f"glora_{path}.default.{side}": ADAMW for path in "AB" for side in ("Xd", "Xu")},
    ),
    "Poly": (
        "PolyConfig",
        {"r": 4, "n_tasks": 2},
        {"poly_lora_A.default": ADAMW, "poly_lora_B.default": ADAMW, "poly_router.default.module_logits": ADAMW},
    ),
    "IA3": ("IA3Config", {"feedforward_modules": []}, {"ia3_l.default": VECTOR}),
    "OFT": ("OFTConfig", {"oft_block_size": 8}, {"oft_R.default.weight": ADAMW}),
    "HRA": ("HRAConfig", {"r": 4}, {"hra_u.default": ADAMW}),
    "PSOFT": (
        "PsoftConfig",
        {"r": 4},
        {f"psoft_R.default.{name}": VECTOR for name in ("weight", "vector_a", "vector_b")},
    ),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 10}, {"fourierft_spectrum.default": VECTOR}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 10}, {"waveft_spectrum.default": VECTOR}),
    "C3A": ("C3AConfig", {"block_size": 8}, {"c3a_kernel.default": ADAMW}),
    "MiSS": ("MissConfig", {"r": 4}, {"miss_block.default": ADAMW}),
    "DEFT": ("DeftConfig", {}, {"deft_P.default": ADAMW, "deft_R.default": ADAMW}),
    "SHiRA": ("ShiraConfig", {"r": 4}, {"shira_weight.default": VECTOR}),
    "RoAd": ("RoadConfig", {"group_size": 8}, {"road_theta.default": VECTOR, "road_alpha.default": VECTOR}),
    "FRoD": ("FrodConfig", {}, {"frod_lambda_l.default": VECTOR, "frod_lambda_s_values.default": VECTOR}),
    "BEFT": ("BeftConfig", {}, {"beft_bias.default": VECTOR}),
    "PEANuT": ("PeanutConfig", {}, {"peanut_A.default.weight": ADAMW, "peanut_B.default.weight": ADAMW}),
    "OSF": (
        "OSFConfig",
        {},
        {
            "osf_svd_params.default.U_low": ADAMW,
            "osf_svd_params.default.S_low": VECTOR,
            "osf_svd_params.default.V_low": ADAMW,
        },
    ),
    "trainable tokens": (
        "TrainableTokensConfig",
        {"target_modules": ["embed_tokens"], "token_indices": [1]},
        {"trainable_tokens_delta.default": ADAMW},
    ),
    "prompt tuning": ("PromptTuningConfig", PROMPT, {"prompt_encoder.default.embedding.weight": ADAMW}),
    "multitask prompt tuning": (
        "MultitaskPromptTuningConfig",
        {**PROMPT, "num_tasks": 2},
        {
            "prompt_encoder.default.embedding.weight": ADAMW,
            "prompt_encoder.default.prefix_task_cols": ADAMW,
            "prompt_encoder.default.prefix_task_rows": ADAMW,
        },
    ),
    "prefix tuning": (
        "PrefixTuningConfig",
        {**PROMPT, "prefix_projection": True, "encoder_hidden_size": 16},
        {
            "prompt_encoder.default.embedding.weight": ADAMW,
            "prompt_encoder.default.transform.0.weight": ADAMW,
            "prompt_encoder.default.transform.0.bias": VECTOR,
            "prompt_encoder.default.transform.2.weight": ADAMW,
            "prompt_encoder.default.transform.2.bias": VECTOR,
        },
    ),
    "P-tuning": (
        "PromptEncoderConfig",
        {**PROMPT, "encoder_hidden_size": 16},
        {"prompt_encoder.default.embedding.weight": ADAMW}
        | {f"prompt_encoder.default.mlp_head.{index}.weight": ADAMW for index in (0, 2, 4)}
        | {f"prompt_encoder.default.mlp_head.{index}.bias": VECTOR for index in (0, 2, 4)},
    ),
    "CPT": (
        "CPTConfig",
        {
            "task_type": "CAUSAL_LM",
            "cpt_token_ids": [0, 1, 2],
            "cpt_mask": [1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 3],
        },
        {"prompt_encoder.default.delta_embedding.weight": ADAMW},
    ),
    "cartridge": ("CartridgeConfig", PROMPT, {"prompt_encoder.default.trainable_embedding": ADAMW}),
    "LLaMA-Adapter": (
        "AdaptionPromptConfig",
        {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"},
        {"adaption_prompt": ADAMW, "adaption_gate": VECTOR},
    ),
}


# Tuners of peft that the table above leaves out.
ELSEWHERE = {
    "XLORA",  # its own test
    "SHADOW",  # its own test
    "LN_TUNING",  # its own test
    "ADAMSS",  # asks for scikit-learn
    "BOFT",  # compiles a CUDA extension where it finds a compiler
}


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_tuner_of_peft(tuner):
    config, options, expected = TUNERS[tuner]
    if "task_type" not in options:
        options = {**Q_PROJ, **options}
    assert routes(peft.get_peft_model(tiny_llama(), getattr(peft, config)(**options))) == expected


def test_no_tuner_of_peft_is_forgotten():
    planned = {getattr(peft, config)(**options).peft_type.value for config, options, _ in TUNERS.values()}
    assert planned | ELSEWHERE == {kind.value for kind in peft.PeftType}


@pytest.mark.parametrize(
    ("policy", "on_normuon"), [("adamw", set()), ("normuon", {"lora_A", "lora_B"}), ("b", {"lora_B"})]
)
def test_the_policy_chooses_the_factors(policy, on_normuon):
    found = routes(lora(tiny_llama(), use_dora=True), policy)
    assert {name.split(".")[0] for name, (layout, _) in found.items() if layout} == on_normuon


def test_biases_of_factors_do_not_decay():
    model = nn.Sequential()
    model.fc = nn.Linear(8, 8)
    assert routes(lora(model, target_modules=["fc"], lora_bias=True))["lora_B.default.bias"] == VECTOR


def test_factors_of_an_embedding_are_adamw():
    found = routes(lora(tiny_llama(), target_modules=["embed_tokens"]))
    assert found == {"lora_embedding_A.default": (None, True), "lora_embedding_B.default": (None, True)}


def test_the_sampler_of_monteclora_is_adamw():
    found = routes(lora(tiny_llama(), monteclora_config=peft.MontecloraConfig(buffer_size=1)))
    assert found.pop("lora_A.default.weight") == found.pop("lora_B.default.weight") == ("o i", True)
    assert found
    assert all(name.startswith("lora_monteclora_sampler.") and not layout for name, (layout, _) in found.items())


def test_the_classifier_of_xlora_is_adamw(tmp_path):
    lora(tiny_llama(use_cache=False)).save_pretrained(tmp_path)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(tmp_path)}, use_trainable_adapters=True
    )
    found = decisions(peft.get_peft_model(tiny_llama(), config))
    assert {decision.layout for name, decision in found.items() if ".lora_" in name} == {"o i"}
    classifier = [decision for name, decision in found.items() if ".internal_xlora_classifier." in name]
    assert classifier
    assert not any(decision.layout for decision in classifier)


def test_the_side_network_of_shadow_is_adamw():
    found = decisions(peft.get_peft_model(tiny_llama(), peft.ShadowConfig(**Q_PROJ)))
    assert "base_model.shadow_backbone.default.layers.0.mlp.up_proj.weight" in found
    assert not any(decision.layout for decision in found.values())


def test_a_tuned_copy_is_planned_as_its_original():
    model = nn.Sequential()
    model.norm = nn.LayerNorm(8)
    found = decisions(peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["norm"])))
    assert found == {f"base_model.model.norm.ln_tuning_layers.default.{name}": None for name in ("weight", "bias")}


@pytest.mark.parametrize(("kind", "axes"), [("Conv1d", "o i i"), ("Conv2d", "o i i i"), ("Conv3d", "o i i i i")])
def test_factors_of_a_convolution_are_convolutions(kind, axes):
    model = nn.Sequential()
    model.fc = getattr(nn, kind)(8, 16, 3)
    found = routes(lora(model, target_modules=["fc"], use_dora=True))
    assert found == {
        "lora_A.default.weight": (axes, True),
        "lora_B.default.weight": (axes, True),
        "lora_magnitude_vector.default.weight": (None, False),
    }


def test_factors_of_conv1d_are_stored_as_those_of_linear():
    model = lora(gpt2(), target_modules=["c_fc"], fan_in_fan_out=True)
    assert [parameter.shape for parameter in model.parameters() if parameter.requires_grad] == [(4, 32), (128, 4)]
    assert {decision.layout for decision in decisions(model).values()} == {"o i"}


def test_factors_in_multihead_attention():
    model = nn.Sequential()
    model.attn = nn.MultiheadAttention(16, 2)
    found = decisions(lora(model, target_modules=["attn"]))
    assert len(found) == 4
    assert {decision.layout for decision in found.values()} == {"o i"}


def test_the_adapted_weight_in_multihead_attention():
    model = nn.Sequential()
    model.attn = nn.MultiheadAttention(16, 2)
    layer = lora(model, target_modules=["attn"]).base_model.model.attn
    (owner,) = ModelFacts(layer).owners[layer.lora_B["default"].weight]
    assert adapted_weight(owner) is layer.base_layer.in_proj_weight


def tiny_mixtral():
    torch.manual_seed(0)
    options = {**SMALL, "num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": 64}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**options, num_local_experts=3))


def expert_lora():
    """Return a Mixtral with LoRA on its stacked experts, and the wrapper of ``down_proj``."""
    model = lora(tiny_mixtral(), r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    return model, model.base_model.model.model.layers[0].mlp.experts


def test_factor_a_of_experts_is_one_block_per_expert():
    model, _ = expert_lora()
    found = routes(model)
    assert found.pop("lora_A.default.weight", None) is None  # the prefix of experts is another
    assert {name.split(".experts.")[-1]: layout for name, (layout, _) in found.items()} == {
        "lora_A.default.weight": "o=2*3 i",
        "lora_B.default.weight": None,
    }


def test_the_blocks_of_factor_a_are_the_experts_of_peft():
    # a block alone changes the weight of its own expert, and of no other
    _, wrapper = expert_lora()
    weight = wrapper.lora_A["default"].weight
    nn.init.normal_(wrapper.lora_B["default"].weight)
    for expert, box in enumerate(parse_layout("o=2*3 i").block_boxes(weight.shape)):
        with torch.no_grad():
            weight.zero_()
            ((first, last),) = box[0]
            weight[first:last] = 1
            changed = wrapper.get_delta_weight("default").abs().amax((1, 2)) > 0
        assert changed.tolist() == [index == expert for index in range(3)]


def test_the_columns_of_factor_b_are_the_experts_of_peft_in_turns():
    _, wrapper = expert_lora()
    weight = wrapper.lora_B["default"].weight
    for column in range(6):
        with torch.no_grad():
            weight.zero_()
            weight[:, column] = 1
            changed = wrapper.get_delta_weight("default").abs().amax((1, 2)) > 0
        assert changed.tolist() == [index == column % 3 for index in range(3)]


def test_the_blocks_of_a_block_diagonal_factor_share_no_input():
    model = lora(tiny_llama(), use_bdlora=peft.BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2))
    factor = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"]
    whole = factor.weight_as_blockdiagonal_matrix() * 0
    (((first, last),), _), _ = parse_layout("o=16*2 i").block_boxes(factor.weight.shape)
    with torch.no_grad():
        factor.weight.fill_(1)
        whole = factor.weight_as_blockdiagonal_matrix()
    assert whole[first:last].bool().any(0).tolist() == [True, True, False, False]


# Layers of other libraries and of hand: written after theirs, with the attributes that they have.


class TorchtuneLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(12, 8), requires_grad=False)
        self.lora_a = nn.Linear(8, 2, bias=False)
        self.lora_b = nn.Linear(2, 12, bias=False)


class KohyaModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora_down = nn.Conv2d(8, 2, 3, bias=False)
        self.lora_up = nn.Conv2d(2, 12, 1, bias=False)


class LoRALinearLayer(nn.Module):  # diffusers
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(8, 2, bias=False)
        self.up = nn.Linear(2, 12, bias=False)


class LoralibLinear(nn.Linear):
    def __init__(self, *, out=12, rank=(2, 2)):
        super().__init__(8, 12, bias=False)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.zeros(rank[0], 8))
        self.lora_B = nn.Parameter(torch.zeros(out, rank[1]))


class LoralibEmbedding(nn.Embedding):
    def __init__(self):
        super().__init__(20, 8)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.zeros(2, 20))
        self.lora_B = nn.Parameter(torch.zeros(8, 2))


class MultipliedFromTheRight(nn.Module):  # x @ lora_A @ lora_B, a layer of equal width
    def __init__(self):
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(8, 2))
        self.lora_B = nn.Parameter(torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (TorchtuneLinear(), ["o i", "o i"]),
        (KohyaModule(), ["o i i i", "o i i i"]),
        (LoRALinearLayer(), ["o i", "o i"]),
        (LoralibLinear(), ["o i", "o i"]),
        # MergedLinear: query and value of three fused projections
        (LoralibLinear(out=8, rank=(4, 2)), ["o=2*2 i", "o=4*2 i"]),
        (LoralibLinear(rank=(3, 2)), [None, None]),
        (LoralibEmbedding(), [None, None]),
        (MultipliedFromTheRight(), ["i o", "i o"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_pairs_of_other_libraries(layer, expected):
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), layer)
    assert [decision.layout for decision in decisions(model).values()] == expected


@pytest.mark.parametrize("policy", LORA_POLICIES)
def test_pairs_of_other_libraries_follow_the_policy(policy):
    found = decisions(nn.Sequential(TorchtuneLinear()), policy)
    on_normuon = [name for name, decision in found.items() if decision.layout]
    assert (
        on_normuon == {"adamw": [], "normuon": ["0.lora_a.weight", "0.lora_b.weight"], "b": ["0.lora_b.weight"]}[policy]
    )


def test_common_names_are_no_factors():
    layer = nn.Module()
    layer.down, layer.up = nn.Linear(8, 2), nn.Linear(2, 8)
    assert set(decisions(nn.Sequential(layer)).values()) == {None}


def test_a_bare_factor_without_its_partner_is_adamw():
    # its shape alone does not tell which dimension is the rank
    layer = nn.Module()
    layer.lora_A = nn.Parameter(torch.zeros(2, 8))
    assert decisions(nn.Sequential(layer))["0.lora_A"].layout is None


def test_parts_of_a_parametrized_factor_are_adamw():
    layer = TorchtuneLinear()
    nn.utils.parametrizations.weight_norm(layer.lora_a)
    found = decisions(nn.Sequential(layer))
    assert found["0.lora_a.parametrizations.weight.original1"].layout is None
    assert found["0.lora_b.weight"].layout == "o i"


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
def test_a_model_without_adapters_has_none(build):
    assert set(decisions(build()).values()) == {None}


def test_a_base_that_is_trained_along_is_no_adapter():
    model = lora(tiny_llama())
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    weight.requires_grad_(True)
    assert decisions(model)["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"] is None


def test_the_adapted_weight_of_a_factor():
    model = lora(tiny_llama())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    (owner,) = ModelFacts(model).owners[layer.lora_B["default"].weight]
    assert adapted_weight(owner) is layer.base_layer.weight


def test_the_adapted_weight_of_nested_wrappers():
    model = lora(tiny_mixtral(), r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    facts = ModelFacts(model)
    outer = model.base_model.model.model.layers[0].mlp.experts
    for wrapper in (outer, outer.base_layer):
        (owner,) = facts.owners[wrapper.lora_A["default"].weight]
        assert adapted_weight(owner) is wrapper.get_param()


def test_what_is_no_factor_adapts_no_weight():
    model = lora(tiny_llama(), use_dora=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    (owner,) = ModelFacts(model).owners[layer.lora_magnitude_vector["default"].weight]
    assert adapted_weight(owner) is None


# The plan of a whole model.


def rows(plan, part=""):
    """Return name -> everything else of each row whose name contains ``part``."""
    return {row.pop("name"): row for row in plan.to_dict() if part in row["name"]}


def score_model():
    config = transformers.LlamaConfig(**SMALL, vocab_size=64, num_labels=5, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


def vision_model():
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=16, num_labels=5)
    return transformers.ViTForImageClassification(config)


def vision_model_with_a_list_of_heads():
    model = vision_model()
    model.classifier = nn.Sequential(nn.Dropout(), model.classifier)
    return model


def clip():
    text = {**SMALL, "projection_dim": 16, "vocab_size": 64}
    vision = {**SMALL, "projection_dim": 16, "image_size": 32, "patch_size": 16}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16),
    )


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


class PlainMixture(nn.Module):
    """A model without conventions: a gate beside a list of experts, heads by name, by shape and by place."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.q_proj = nn.Linear(16, 16)
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))
        self.classifier = nn.Linear(16, 5)
        self.output = nn.Linear(16, 64)
        self.fc = nn.Linear(16, 7)


@pytest.mark.parametrize(
    ("build", "module"),
    [
        (tiny_llama, "lm_head"),
        (tiny_llama, "embed_tokens"),
        (tiny_llama, "o_proj"),
        (tiny_llama, "input_layernorm"),
        (score_model, "score"),
        (vision_model, "classifier"),
        (clip, "text_projection"),
        (tiny_mixtral, "gate"),
        (tiny_mixtral, "experts"),
        (PlainMixture, "gate"),
        (PlainMixture, "classifier"),
        (PlainMixture, "output"),
        (PlainMixture, "fc"),
        (vision_model_with_a_list_of_heads, "classifier.1"),
    ],
)
def test_a_saved_module_is_planned_as_its_original(build, module):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[module])
    # a name that could be the number of a layer
    plan = plan_parameters(peft.get_peft_model(build(), config, adapter_name="0"), lora="normuon")
    found = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.0", ""): row
        for name, row in rows(plan, ".modules_to_save.").items()
    }
    assert found
    assert found == rows(plan_parameters(build()), f"{module}.")


def test_a_saved_conv1d_is_planned_as_its_original():
    model = lora(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["c_fc"])
    row = plan_parameters(model, lora="normuon")[
        "base_model.model.transformer.h.0.mlp.c_fc.modules_to_save.default.weight"
    ]
    assert row.layout == "i o"


def test_the_saved_copy_of_a_tied_head_is_a_head():
    model = lora(tiny_llama(tie_word_embeddings=True), modules_to_save=["lm_head"])
    plan = plan_parameters(model, lora="normuon")
    assert plan["base_model.model.lm_head.modules_to_save.default.weight"].reason == "output head"


def test_a_base_that_is_trained_along_is_planned_as_without_adapters():
    model = lora(tiny_llama())
    model.requires_grad_(True)
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): row
        for name, row in rows(plan_parameters(model)).items()
        if ".lora_" not in name
    }
    assert found == rows(plan_parameters(tiny_llama()))


def test_a_frozen_base_is_not_in_the_plan():
    names = {name for name in rows(plan_parameters(lora(tiny_llama()), lora="b"))}
    assert names
    assert all(".lora_" in name for name in names)


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (tiny_llama, {"target_modules": ["lm_head"]}),
        (PlainMixture, {"target_modules": ["gate"]}),
        (tiny_mixtral, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
        (vision_model, {"target_modules": ["projection"]}),
    ],
    ids=["head", "gate", "router", "patch embedding"],
)
def test_factors_of_a_weight_that_belongs_to_adamw_are_adamw(build, targets):
    # o_proj keeps a matrix for NorMuon
    plan = plan_parameters(lora(build(), **targets, modules_to_save=["o_proj", "q_proj"]), lora="normuon")
    found = rows(plan, ".lora_")
    assert len(found) == 2
    assert {row["algorithm"] for row in found.values()} == {"adamw"}


def test_adapters_alone_go_to_adamw_as_asked_and_are_told():
    with pytest.warns(UserWarning, match="nothing is on NorMuon"):
        plan = plan_parameters(lora(tiny_llama()), lora="adamw")
    assert {row.algorithm for row in plan} == {"adamw"}


def test_a_policy_that_finds_no_factor_says_so():
    model = peft.get_peft_model(tiny_llama(), peft.IA3Config(**Q_PROJ, feedforward_modules=[]))
    with pytest.warns(UserWarning, match="There is no matrix for NorMuon"):
        plan_parameters(model, lora="normuon")


# Training.


def frozen_tensors(model):
    """Return the bytes of everything that is not trained, of quantized weights part by part.

    Bytes, since packed weights in floating-point storage may read as NaN, which equals nothing.
    """
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.requires_grad:
            parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
            inner = {part: getattr(tensor, part) for part in parts} or {"": tensor.data}
            found |= {f"{name}.{part}": value.reshape(-1).view(torch.uint8).clone() for part, value in inner.items()}
    return found


def train(model, **options):
    """Take three steps; return the frozen tensors before, and the names of trained parameters that did not move."""
    examples = token_blocks(2)
    batch = {key: torch.stack([example[key] for example in examples]) for key in ("input_ids", "labels")}
    model(**batch)  # bitsandbytes packs its weights anew for the CPU at their first use
    before = frozen_tensors(model)
    start = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    optimizer = build_normuon(model, lr=1e-2, **options)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = dict(model.named_parameters())
    return before, [name for name, value in start.items() if torch.equal(parameters[name], value)]


def assert_base_stays_and_adapters_move(model, **options):
    before, unmoved = train(model, **options)
    after = frozen_tensors(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not unmoved


@pytest.mark.parametrize("policy", LORA_POLICIES)
def test_training_moves_adapters_and_leaves_the_base(policy):
    model = lora(tiny_llama(), use_dora=True, modules_to_save=["o_proj", "lm_head"])
    assert_base_stays_and_adapters_move(model, lora=policy)


def test_training_per_expert_factors_leaves_the_base():
    model, _ = expert_lora()
    assert_base_stays_and_adapters_move(model, lora="normuon")


def test_the_adamw_policy_is_adamw_of_torch():
    def loss(model):
        examples = token_blocks(2)
        return model(**{key: torch.stack([example[key] for example in examples]) for key in examples[0]}).loss

    ours, theirs = (lora(tiny_llama()) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizers = (
        build_normuon(ours, lr=1e-2, adamw_betas=(0.9, 0.99), adamw_weight_decay=0.1),
        torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
    )
    for _ in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert max_difference(ours, theirs) < 1e-6


# Quantized bases.


def torchao_llama(config):
    model = tiny_llama()
    quantize_(model.model, config)
    return model


def bitsandbytes_llama(folder, **options):
    # its weights are packed for the CPU in blocks that smaller sizes do not fill
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    quantization = transformers.BitsAndBytesConfig(**options)
    return transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)


QUANTIZED_LLAMAS = {
    "torchao int8": lambda folder: torchao_llama(Int8WeightOnlyConfig()),
    "torchao int4": lambda folder: torchao_llama(IntxWeightOnlyConfig(torch.int4)),
    "torchao float8": lambda folder: torchao_llama(Float8WeightOnlyConfig()),
    "bitsandbytes 4 bits": lambda folder: bitsandbytes_llama(folder, load_in_4bit=True),
    "bitsandbytes 4 bits in float32": lambda folder: bitsandbytes_llama(
        folder, load_in_4bit=True, bnb_4bit_quant_storage=torch.float32
    ),
    "bitsandbytes 8 bits": lambda folder: bitsandbytes_llama(folder, load_in_8bit=True),
}


@pytest.fixture(params=QUANTIZED_LLAMAS)
def quantized_llama(request, tmp_path):
    model = QUANTIZED_LLAMAS[request.param](tmp_path)
    return model.requires_grad_(False)


def test_quantized_weights_are_known(quantized_llama):
    weights = [layer.self_attn.q_proj.weight for layer in quantized_llama.model.layers]
    assert all(is_quantized(weight) for weight in weights)
    assert not is_quantized(quantized_llama.model.norm.weight)


@pytest.mark.parametrize("policy", LORA_POLICIES)
def test_a_quantized_base_is_not_in_the_plan(quantized_llama, policy):
    names = [row.name for row in plan_parameters(lora(quantized_llama), lora=policy)]
    assert len(names) == 4
    assert all(".lora_" in name for name in names)


@pytest.mark.parametrize("policy", LORA_POLICIES)
def test_training_leaves_a_quantized_base(quantized_llama, policy):
    assert_base_stays_and_adapters_move(lora(quantized_llama), lora=policy)


@pytest.mark.parametrize("kind", ["torchao int8", "torchao int4", "torchao float8", "bitsandbytes 4 bits in float32"])
def test_a_quantized_weight_that_requires_a_gradient_is_refused_by_name(kind, tmp_path):
    # torch itself refuses the others, whose dtype is an integer
    model = QUANTIZED_LLAMAS[kind](tmp_path)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' .* quantized .*; freeze it"):
        plan_parameters(model)


def test_a_quantized_weight_in_a_group_made_by_hand_is_refused_by_name():
    weight = torchao_llama(Int8WeightOnlyConfig()).model.layers[0].mlp.up_proj.weight
    with pytest.raises(TypeError, match=r"'up_proj\.weight' is quantized"):
        NorMuon([("up_proj.weight", weight.requires_grad_(True))])


def test_a_weight_that_is_cast_in_the_forward_pass_only_is_not_quantized():
    # what torchao's float8 training puts in place of a weight
    weight = WeightWithDynamicFloat8CastTensor(torch.zeros(4, 4), LinearMMConfig(), torch.float8_e4m3fn)
    assert not is_quantized(nn.Parameter(weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_numbers_that_can_be_trained_are_not_quantized(dtype):
    assert not is_quantized(torch.zeros(2, 2, dtype=dtype, device="meta"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_packed_and_rounded_numbers_are_quantized(dtype):
    assert is_quantized(torch.zeros(2, 2, dtype=dtype, device="meta"))
