"""The plan: every rule of its table on a model that has the case, overrides, the printed table, refusals."""

import re

import pytest
import torch
import transformers
from torch import nn

from normuon_plugins import build_normuon, plan_parameters
from normuon_plugins.core import expert_facts
from normuon_plugins.core.plan_table import fold_names
from tests.models import PlainTransformer, tiny_llama

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def layouts(model, **options):
    """Return name -> layout, None for AdamW."""
    return {row.name: row.layout for row in plan_parameters(model, **options)}


def build(architecture, config, **options):
    with torch.device("meta"):
        return getattr(transformers, architecture)(getattr(transformers, config)(**options))


def test_llama_projections_are_matrices_and_the_rest_is_not():
    plan = plan_parameters(tiny_llama())
    for row in plan:
        assert (row.layout == "o i") == (".self_attn." in row.name or ".mlp." in row.name)
    assert plan["model.embed_tokens.weight"].reason == "embedding"
    assert plan["lm_head.weight"].reason == "output head"
    assert not plan["model.norm.weight"].decay


def test_tied_weights_are_planned_once_as_an_embedding():
    plan = plan_parameters(tiny_llama(tie_word_embeddings=True))
    assert plan["model.embed_tokens.weight"].algorithm == "adamw"
    with pytest.raises(KeyError):
        plan["lm_head.weight"]


def test_a_head_tied_to_something_that_is_no_embedding_is_still_a_head():
    # the first name of the shared weight is a plain Linear's
    model = tiny_llama()
    model.model.layers[0].extra = nn.Linear(32, 64, bias=False)
    model.model.layers[0].extra.weight = model.lm_head.weight
    assert plan_parameters(model)["model.layers.0.extra.weight"].reason == "output head"


def test_gpt2_conv1d_is_transposed():
    found = layouts(build("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=1, n_head=4))
    assert found["transformer.h.0.attn.c_attn.weight"] == "i o=32+32+32"
    for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert found[f"transformer.h.0.{name}.weight"] == "i o"
    assert found["transformer.wte.weight"] is None
    assert found["transformer.wpe.weight"] is None


@pytest.mark.parametrize(
    ("architecture", "config", "options", "layout"),
    [
        ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 3, "num_key_value_heads": 2}, "e o=48+48 i"),
        ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 4, "num_key_value_heads": 2}, "e i o%1+1"),
        # No flag; the two weights fit each other only when read transposed.
        (
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            {"num_local_experts": 4, "num_key_value_heads": 2, "intermediate_size_mlp": 48, "head_dim": 8},
            "e i o=48+48",
        ),
    ],
)
def test_stacked_experts_and_their_router(architecture, config, options, layout):
    model = build(architecture, config, **{**SMALL, **options})
    plan = plan_parameters(model)
    experts = [row for row in plan if re.search(r"experts\.(gate_up|down)_proj$", row.name)]
    assert [row.layout for row in experts] == [layout, re.sub(r"[=%][0-9+]+", "", layout)]
    routers = [row for row in plan if re.search(r"\.(gate|router)\.weight$", row.name)]
    assert [row.reason for row in routers] == ["router: one row per expert"]
    # the axis of neurons against torch's own Linear: gate and up project from hidden_size, down projects to it
    for row in experts:
        neurons = row.shape[re.sub(r"[=%][0-9+]+", "", layout).split().index("o")]
        assert neurons == (32 if row.name.endswith("down_proj") else 96)
    for row in plan:
        if row.name.endswith("_proj_bias"):
            assert (row.algorithm, row.decay) == ("adamw", False)


def test_classification_head_and_patch_embedding():
    model = build("ViTForImageClassification", "ViTConfig", **SMALL, image_size=32, patch_size=16)
    found = layouts(model)
    assert found["classifier.weight"] is None
    assert found["vit.embeddings.patch_embeddings.projection.weight"] is None
    assert found["vit.embeddings.cls_token"] is None
    assert sum(layout == "o i" for layout in found.values()) == 6


def test_masked_language_model_head_lies_outside_the_base_model():
    found = layouts(build("BertForMaskedLM", "BertConfig", **SMALL, vocab_size=100))
    assert all(layout is None for name, layout in found.items() if name.startswith("cls."))
    assert sum(layout == "o i" for layout in found.values()) == 6


def test_clip_projections_are_heads():
    small = {**SMALL, "projection_dim": 16}
    found = layouts(build("CLIPModel", "CLIPConfig", text_config=small, vision_config=small, projection_dim=16))
    assert found["visual_projection.weight"] is None
    assert found["text_projection.weight"] is None
    assert sum(layout == "o i" for layout in found.values()) == 12


def test_classifier_of_a_model_without_a_base_is_a_head():
    options = {"vision_config": {**SMALL, "image_size": 32, "patch_size": 16}, "text_config": SMALL, "num_labels": 5}
    plan = plan_parameters(build("CLIPForImageClassification", "CLIPConfig", **options))
    assert plan["classifier.weight"].reason == "output head"


def test_mamba_keeps_its_projections_and_nothing_else():
    plan = plan_parameters(build("MambaForCausalLM", "MambaConfig", hidden_size=32, num_hidden_layers=1, vocab_size=64))
    assert [row.name.split(".")[-2] for row in plan if row.layout] == ["in_proj", "x_proj", "dt_proj", "out_proj"]
    assert plan["backbone.layers.0.mixer.A_log"].reason == "state-space parameter 'A_log' of MambaMixer"
    assert plan["backbone.layers.0.mixer.conv1d.weight"].reason == "Conv1d with one input channel per group"


def test_a_model_without_conventions():
    assert layouts(PlainTransformer()) == {
        "embed.weight": None,
        "layer.self_attn.in_proj_weight": "o=16+16+16 i",
        "layer.self_attn.in_proj_bias": None,
        "layer.self_attn.out_proj.weight": "o i",
        "layer.self_attn.out_proj.bias": None,
        "layer.linear1.weight": "o i",
        "layer.linear1.bias": None,
        "layer.linear2.weight": "o i",
        "layer.linear2.bias": None,
        "layer.norm1.weight": None,
        "layer.norm1.bias": None,
        "layer.norm2.weight": None,
        "layer.norm2.bias": None,
        "mix.weight": "o i i",
        "mix.bias": None,
        "depthwise.weight": None,
        "depthwise.bias": None,
        "up.weight": "i o i",
        "up.bias": None,
        "gate.weight": None,
        "gate.bias": None,
        "head.weight": None,
        "head.bias": None,
    }


def test_the_last_layer_of_a_model_without_a_recognised_head_says_so():
    plan = plan_parameters(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    assert plan["0.weight"].reason == "Linear"
    assert "no output head was recognised" in plan["2.weight"].reason


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_at_the_end_of_a_model_without_a_recognised_head_says_so(kind):
    network = nn.Module()  # in the order of a U-Net: the Linear is in the middle
    network.conv_in, network.time = nn.Conv2d(4, 8, 3), nn.Linear(8, 8)
    network.conv_out = kind(8, 4, 3)
    plan = plan_parameters(network)
    assert plan["time.weight"].reason == "Linear"
    assert plan["conv_in.weight"].reason == "Conv2d"
    assert "no output head was recognised: override it" in plan["conv_out.weight"].reason
    assert plan["conv_out.weight"].algorithm == "normuon"
    network.classifier = nn.Linear(8, 4)
    assert plan_parameters(network)["conv_out.weight"].reason == kind.__name__


def test_each_module_is_asked_once_for_its_experts_however_many_stand_beside_it(monkeypatch):
    asked, count = [], expert_facts.expert_counts
    monkeypatch.setattr(expert_facts, "expert_counts", lambda module: asked.append(module) or count(module))
    model = nn.Module()
    model.projections = nn.ModuleList(nn.ModuleList(nn.Linear(4, 8) for _ in range(20)) for _ in range(3))
    plan_parameters(model)
    assert 63 <= len(asked) == len(set(asked)) <= len(list(model.modules()))


def test_wrapping_a_hugging_face_model_changes_nothing():
    wrapper = nn.Module()
    wrapper.model = tiny_llama()
    inside = {f"model.{name}": layout for name, layout in layouts(tiny_llama()).items()}
    assert layouts(wrapper) == inside


@pytest.mark.parametrize(
    ("architecture", "config", "options", "router"),
    [
        # the router wraps its Linear; the experts, a ModuleDict, stand beside the wrapper
        (
            "SwitchTransformersForConditionalGeneration",
            "SwitchTransformersConfig",
            {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_experts": 4},
            "encoder.block.1.layer.1.mlp.router.classifier.weight",
        ),
        (
            "JetMoeForCausalLM",
            "JetMoeConfig",
            {"num_hidden_layers": 1, "hidden_size": 32, "num_local_experts": 4, "vocab_size": 64},
            "model.layers.0.mlp.router.layer.weight",
        ),
        (
            "LongcatFlashForCausalLM",
            "LongcatFlashConfig",
            {"num_layers": 1, "hidden_size": 32, "n_routed_experts": 4, "vocab_size": 64},
            "model.layers.0.mlp.router.classifier.weight",
        ),
    ],
)
def test_wrapped_routers(architecture, config, options, router):
    plan = plan_parameters(build(architecture, config, **options))
    assert "outer" in plan[router].reason, plan[router]  # "router: ..." or "inside ...Router"
    assert plan[router].algorithm == "adamw"


def test_output_projection_that_no_method_names_mirrors_its_embedding():
    # FSMT's get_output_embeddings does not name it; a head declared first, with another Linear last, is alike
    model = nn.Module()
    model.embed = nn.Embedding(100, 16)
    model.head = nn.Linear(16, 100, bias=False)
    model.blocks = nn.ModuleList([nn.Linear(16, 16, bias=False), nn.Linear(16, 100, bias=False)])
    model.value = nn.Linear(16, 3, bias=False)
    assert layouts(model) == {
        "embed.weight": None,
        "head.weight": None,
        "blocks.0.weight": "o i",
        "blocks.1.weight": "o i",  # inside a list of layers: the shape alone does not make a head
        "value.weight": "o i",
    }


def test_single_rows_and_columns_are_no_matrices():
    model = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8), nn.Conv1d(8, 1, 3))
    plan = plan_parameters(model)
    assert plan["0.weight"].reason == "Linear, but 8 x 1 is no matrix"
    assert plan["2.weight"].reason == "Conv1d, but 1 x 24 is no matrix"
    assert [row.name for row in plan if row.layout] == ["1.weight"]


def test_gate_beside_a_list_of_any_experts_is_a_router():
    block = nn.Module()
    block.gate = nn.Linear(8, 3, bias=False)
    block.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
    assert layouts(block)["gate.weight"] is None


def test_grouped_transposed_convolution_has_no_neuron_axis():
    model = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose2d(8, 8, 2, groups=4), nn.Conv2d(8, 8, 2, groups=4))
    found = layouts(model)
    assert found["1.weight"] is None
    assert found["2.weight"] == "o i i i"


def test_convolutional_lora_factors_are_convolutions():
    model = nn.Module()
    model.lora_A = nn.ModuleDict({"default": nn.Conv2d(8, 4, 3, bias=False)})
    assert layouts(model, lora="normuon") == {"lora_A.default.weight": "o i i i"}


def test_methods_that_want_arguments_and_cycles_do_not_disturb():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Linear(4, 4, bias=False)
            self.hidden.back = self

        def get_classifier(self, name):
            raise RuntimeError(name)

    assert set(layouts(Model())) == {"hidden.weight"}


def test_shared_modules_are_found_by_each_of_their_names():
    model = nn.Module()
    model.first = nn.Linear(4, 4, bias=False)
    model.second = model.first
    assert layouts(model, overrides={"second": "i o"}) == {"first.weight": "i o"}


def test_linear_beside_a_bilinear_is_no_router():
    block = nn.Module()
    block.linear, block.bilinear = nn.Linear(4, 6), nn.Bilinear(4, 4, 6)
    found = layouts(block)
    assert found["linear.weight"] == "o i"
    assert found["bilinear.weight"] is None


def test_linear_gate_beside_a_list_of_experts_is_a_router():
    class Expert(nn.Linear):
        pass

    block = nn.Module()
    block.gate = nn.Linear(8, 3, bias=False)
    block.other = nn.Linear(8, 5, bias=False)
    block.experts = nn.ModuleList(Expert(8, 8, bias=False) for _ in range(3))
    found = layouts(block)
    assert found.pop("gate.weight") is None
    assert set(found.values()) == {"o i"}


@pytest.mark.parametrize(("policy", "on_normuon"), [("adamw", set()), ("normuon", {"A", "B"}), ("b", {"B"})])
def test_lora_policy(policy, on_normuon):
    model = nn.Module()
    model.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
    model.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
    model.hidden = nn.Linear(8, 8, bias=False)
    found = layouts(model, lora=policy)
    assert {name[5] for name, layout in found.items() if name.startswith("lora") and layout} == on_normuon


def test_frozen_parameters_are_left_out():
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in {row.name for row in plan_parameters(model)}


def test_frozen_parameters_are_planned_as_if_they_were_trained_where_that_is_asked_for():
    trained = plan_parameters(tiny_llama())
    model = tiny_llama()
    model.model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    model.model.codes = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    plan = plan_parameters(model, include_frozen=True)
    assert plan.to_dict() == trained.to_dict()  # which leaves out the integers
    assert [row.name for row in plan_parameters(model)] == [row.name for row in plan if row.parameter.requires_grad]
    groups = {group["name"]: [name for name, _ in group["params"]] for group in plan.param_groups()}
    assert groups == {group["name"]: [name for name, _ in group["params"]] for group in trained.param_groups()}
    table = str(plan)
    assert re.search(r"layers\.1\.mlp\.up_proj\.weight .* Linear; frozen now\n", table)
    assert re.search(r"\nfrozen +11 tensors +9,824 parameters +50\.\d%\n", table)


def test_what_is_said_of_trainable_parameters_stays_about_those_where_frozen_ones_are_planned():
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 6), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    assert len(plan_parameters(model, strict=True, include_frozen=True)) == 6  # of the bilinear weight no rule knows
    assert plan_parameters(model, overrides={r"1\.weight": "e o i"}, include_frozen=True)["1.weight"].layout == "e o i"
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        plan_parameters(model, overrides={r"1\.weight": "e o i"})
    with pytest.raises(ValueError, match="all 6 parameters are frozen"):
        plan_parameters(model.requires_grad_(False), include_frozen=True)


def test_every_trainable_parameter_is_in_exactly_one_group_and_none_is_empty():
    model = PlainTransformer()
    groups = plan_parameters(model).param_groups(weight_decay=0.3, adamw_weight_decay=0.2)
    named = [(name, parameter) for group in groups for name, parameter in group["params"]]
    assert sorted(name for name, _ in named) == sorted(name for name, _ in model.named_parameters())
    assert all(parameter is model.get_parameter(name) for name, parameter in named)
    algorithms = [group["algorithm"] for group in groups]
    assert algorithms == sorted(algorithms, reverse=True)  # normuon first: trainers log the first group's learning rate
    assert {group["name"]: group.get("weight_decay") for group in groups} == {
        "normuon_o=16+16+16_i": 0.3,
        "normuon_o_i": 0.3,
        "normuon_o_i_i": 0.3,
        "normuon_i_o_i": 0.3,
        "adamw": 0.2,
        "adamw_no_decay": 0.0,
    }


def test_weight_decay_of_the_optimizer_reaches_the_groups_that_do_not_say():
    optimizer = build_normuon(tiny_llama(), weight_decay=0.3, adamw_weight_decay=0.2)
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "normuon_o_i": 0.3,
        "adamw": 0.2,
        "adamw_no_decay": 0.0,
    }


def test_overrides():
    model = PlainTransformer()
    overrides = {r"^gate\.weight": "o i", r"^mix\.w": "adamw", r"linear1\.weight": "i o", r"^head\.weight": "normuon"}
    plan = plan_parameters(model, overrides=overrides)
    assert [plan[name].layout for name in ("gate.weight", "mix.weight", "layer.linear1.weight", "head.weight")] == [
        "o i",
        None,
        "i o",
        "o i",
    ]
    assert plan["gate.weight"].reason == "override"


def test_override_finds_a_tied_weight_by_any_of_its_names():
    model = tiny_llama(tie_word_embeddings=True)
    assert layouts(model, overrides={"lm_head": "o i"})["model.embed_tokens.weight"] == "o i"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"no_such": "adamw"}, "'no_such' matches no trainable parameter"),
        (
            {"linear1": "adamw", r"1\.weight": "adamw"},
            r"'linear1' and '1\\\\.weight' both match 'layer.linear1.weight'",
        ),
        ({"norm1.weight": "normuon"}, "override of 'layer.norm1.weight'.*'o i' describes 2 dimensions"),
        ({"(": "adamw"}, r"override '\(' is no regular expression: missing \)"),
        ({"linear1.weight": "sgd"}, "override of 'layer.linear1.weight' to 'sgd': layout 'sgd' is not understood"),
    ],
)
def test_overrides_that_cannot_hold_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_parameters(PlainTransformer(), overrides=overrides)


def frozen():
    return nn.Linear(3, 3).requires_grad_(False)


def flat_fsdp1():
    module = nn.Module()
    module.flat = nn.Parameter(torch.ones(12))
    module.flat._fsdp_flattened = True
    return module


def zero3():
    module = nn.Linear(3, 3)
    module.weight = nn.Parameter(torch.ones(0))
    module.weight.ds_shape = (3, 3)
    return module


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU, "the model has no parameters"),
        (frozen, "all 2 parameters are frozen"),
        (flat_fsdp1, "FSDP1; use FSDP2"),
        (zero3, "ZeRO-3.*use FSDP2"),
    ],
)
def test_a_plan_without_anything_to_train_or_with_hidden_shapes_is_refused_and_says_what_it_saw(model, message):
    with pytest.raises(ValueError, match=f"There is no matrix for NorMuon: .*{message}"):
        plan_parameters(model(), allow_no_matrix=True)


class FirstStage(nn.Module):
    """What a pipeline leaves of a model on its first rank: no layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.norm = nn.Embedding(8, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.tokens(x))


def test_a_part_of_a_model_without_a_matrix_trains_on_adamw_and_says_so_unless_it_is_meant():
    seen = "all 3 trainable parameters went to AdamW \\(1-D: bias, gain or scalar; embedding\\).*allow_no_matrix=True"
    with pytest.warns(UserWarning, match=f"There is no matrix for NorMuon: {seen}"):
        plan_parameters(FirstStage())
    with pytest.raises(ValueError, match=f"strict=True: There is no matrix for NorMuon: {seen}"):
        plan_parameters(FirstStage(), strict=True)
    assert {row.algorithm for row in plan_parameters(FirstStage(), strict=True, allow_no_matrix=True)} == {"adamw"}
    ours, theirs = FirstStage(), FirstStage()
    options = {"lr": 0.1, "weight_decay": 0.0}
    optimizers = (
        build_normuon(ours, allow_no_matrix=True, adamw_betas=(0.9, 0.999), **options),
        torch.optim.AdamW(theirs.parameters(), fused=True, **options),
    )
    for _ in range(3):
        for stage, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            stage(torch.arange(6)).square().mean(1).sin().sum().backward()
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_parameters_that_cannot_be_trained_are_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(torch.ones(3, 3, dtype=torch.complex32))
    with pytest.raises(ValueError, match=r"'1\.weight' requires a gradient but is torch.complex32"):
        plan_parameters(model)


@pytest.mark.parametrize("option", ["split_fused", "per_head", "strict", "include_frozen", "allow_no_matrix"])
def test_a_word_in_place_of_a_truth_value_is_refused(option):
    with pytest.raises(ValueError, match=f"{option}='false' must be True or False"):
        plan_parameters(nn.Linear(2, 2), **{option: "false"})


def test_unknown_policy_and_unknown_options_are_refused():
    with pytest.raises(ValueError, match="lora='yes' must be one of"):
        plan_parameters(nn.Linear(3, 3), lora="yes")
    with pytest.raises(TypeError, match=r"unknown options \['beta3'\]; known are \['adamw_betas', .*'overrides'"):
        build_normuon(nn.Linear(3, 3), beta3=0.9)


def test_what_is_no_model_is_refused():
    for wrong in (tiny_llama().parameters(), [nn.Linear(2, 2)], None):
        with pytest.raises(TypeError, match=r"the plan needs the model itself, an nn\.Module; got"):
            build_normuon(wrong)
    with pytest.raises(TypeError, match="overrides must map patterns"):
        plan_parameters(nn.Linear(3, 3), overrides=["weight"])


def test_stacked_experts_of_torchtitan():
    experts = nn.Module()
    experts.w1, experts.w3 = (nn.Parameter(torch.zeros(4, 6, 8)) for _ in range(2))
    experts.w2 = nn.Parameter(torch.zeros(4, 8, 6))
    assert layouts(experts) == {"w1": "e o i", "w2": "e o i", "w3": "e o i"}


class TimmAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)


class TimmVisionTransformer(nn.Module):
    """The names and shapes of timm's: raw tokens and positions, a named classifier."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 16))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(*(self.block() for _ in range(2)))
        self.head = nn.Linear(16, 10)

    @staticmethod
    def block():
        block = nn.Module()
        block.attn = TimmAttention(16, 2)
        block.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        block.ls1 = nn.Module()
        block.ls1.gamma = nn.Parameter(torch.ones(16))
        return block

    def get_classifier(self):
        return self.head


def test_timm_like_vision_transformer():
    plan = plan_parameters(TimmVisionTransformer(), strict=True)
    found = {row.name: row.layout for row in plan if row.layout}
    assert set(found) == {
        f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    }
    assert found["blocks.0.attn.qkv.weight"] == "o=16+16+16 i"
    heads = plan_parameters(TimmVisionTransformer(), per_head=True)
    assert heads["blocks.0.attn.qkv.weight"].layout == "o=8*6 i"


def test_last_layers_of_torchvision_and_torchtitan_are_heads():
    for name in ("fc", "output", "classifier", "heads", "lm_head"):
        model = nn.Module()
        model.hidden = nn.Linear(4, 4, bias=False)
        setattr(model, name, nn.Linear(4, 3, bias=False))
        assert layouts(model) == {"hidden.weight": "o i", f"{name}.weight": None}


def test_vit_has_768_hidden_numbers_and_as_many_in_a_patch():
    # 16 x 16 x 3: the number alone does not make a patch embedding
    with torch.device("meta"):
        found = layouts(transformers.ViTModel(transformers.ViTConfig()))
    assert found["pooler.dense.weight"] == "o i"
    assert found["embeddings.patch_embeddings.projection.weight"] is None


def test_linear_that_embeds_patches_is_none_of_the_hidden_matrices():
    found = layouts(build("FuyuForCausalLM", "FuyuConfig"))
    assert found["model.vision_embed_tokens.weight"] is None


def test_strict_names_what_no_rule_recognised():
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 6), nn.Bilinear(4, 4, 6))
    with pytest.raises(
        ValueError, match=r"(?s)no rule recognised 2 parameters:\n  \{1-2\}\.weight: adamw, not recognised"
    ):
        plan_parameters(model, strict=True)
    assert len(plan_parameters(model, overrides={r"[12]\.weight": "adamw"}, strict=True)) == 6
    plan_parameters(tiny_llama(), strict=True)
    with torch.device("meta"):
        plan_parameters(transformers.MambaForCausalLM(transformers.MambaConfig(num_hidden_layers=1)), strict=True)


def test_heads_one_by_one():
    found = layouts(tiny_llama(), per_head=True)
    assert found["model.layers.0.self_attn.q_proj.weight"] == "o=8*4 i"
    assert found["model.layers.0.self_attn.k_proj.weight"] == "o=8+8 i"
    assert found["model.layers.0.self_attn.o_proj.weight"] == "o i"
    block = nn.Module()
    block.query, block.other = nn.Linear(8, 8), nn.Linear(8, 8)
    assert "heads are not known" in plan_parameters(block, per_head=True)["query.weight"].reason
    with pytest.raises(ValueError, match="per_head=True divides fused weights"):
        plan_parameters(tiny_llama(), per_head=True, split_fused=False)


def test_a_name_that_looks_fused_and_says_no_more_is_kept_whole_and_said():
    block = nn.Module()
    block.fused_qkv = nn.Linear(8, 20)
    block.qkv = nn.Linear(8, 24)
    plan = plan_parameters(block)
    assert plan["fused_qkv.weight"].layout == "o i"
    assert "nothing tells how: whole matrix" in plan["fused_qkv.weight"].reason
    assert plan["qkv.weight"].layout == "o=8+8+8 i"  # timm's


def test_flat_parameters_are_refused_also_where_they_are_a_part():
    model = nn.Sequential(nn.Linear(4, 4), flat_fsdp1())
    with pytest.raises(ValueError, match=r"'1\.flat' is a flat 1-D shard of FSDP1; use FSDP2"):
        plan_parameters(model)


def test_printed_table_folds_layers_and_ends_with_the_shares():
    text = str(plan_parameters(tiny_llama()))
    assert "model.layers.{0-1}.mlp.up_proj.weight" in text
    assert len(text.splitlines()) == 2 + 12 + 3 + 2
    assert text.endswith("(adjust_lr_fn='match_progress_adamw').")
    assert re.search(r"normuon +14 tensors +15,360 parameters +78\.\d%", text)
    columns = text.splitlines()[0].split()
    assert columns == ["parameter", "shape", "algorithm", "layout", "decay", "reason"]


def test_rows_as_json_types():
    rows = plan_parameters(nn.Linear(3, 2)).to_dict()
    assert rows[0] == {
        "name": "weight",
        "shape": [2, 3],
        "algorithm": "normuon",
        "layout": "o i",
        "decay": True,
        "reason": "Linear (the last one, and no output head was recognised: override it if this is the head)",
    }


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.0.w", "a.1.w", "a.2.w"], ["a.{0-2}.w"]),
        (["a.0.w", "a.2.w", "a.3.w"], ["a.{0,2-3}.w"]),
        (["a.7.w"], ["a.7.w"]),
        (["w1.w"], ["w1.w"]),
        ([f"l.{i}.e.{j}.w" for i in range(3) for j in range(4)], ["l.{0-2}.e.{0-3}.w"]),
        # not a full box: layer 0 has fewer experts, so one pattern would promise names that do not exist
        (["l.0.e.0.w", "l.1.e.0.w", "l.1.e.1.w"], ["l.0.e.0.w", "l.1.e.{0-1}.w"]),
    ],
)
def test_folded_names_stand_for_exactly_the_names(names, folded):
    assert fold_names(names) == folded
