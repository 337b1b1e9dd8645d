"""Models with fused projections, and each once more with every projection as a Linear of its own.

The second is not made from a layout string: it is another architecture of transformers that computes the same function
(Phi-3 is a Llama, GPT-2 an OPT, GPT-NeoX and Falcon are a Phi, CodeGen is a GPT-J), or the module written out with one
Linear per role. That both compute the same proves which rows are the query, the key, the gate.

Sizes are awkward on purpose: fewer key heads than heads, heads that do not add up to the width, hidden layers that are
no multiple of anything, an odd number of heads.
"""

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import NamedTuple

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from tests.models import VOCABULARY


class Case(NamedTuple):
    """A fused model, what makes the other one from it, and the layouts of its fused parameters.

    Attributes:
        build: Returns the fused model.
        unfuse: Returns, for a fused model, the unfused one with the same weights.
        layouts: End of a parameter's name -> layout, for every fused parameter and every stack of experts.
        heads: Names of the unfused model's Linears that consist of heads -> size of a head.
        tolerance: Of the weights, relative; wider where the model itself computes in float32.
    """

    build: Callable[[], nn.Module]
    unfuse: Callable[[nn.Module], nn.Module]
    layouts: Mapping[str, str]
    heads: Mapping[str, int] = {}
    tolerance: float = 1e-9


def hugging_face(architecture, config, **options):
    """Return a function that builds the model; see ``at_random``."""
    shared = {
        "vocab_size": VOCABULARY,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "use_cache": False,
        "experts_implementation": "eager",  # the default, grouped_mm, has no float64
    }

    return at_random(lambda: getattr(transformers, architecture)(getattr(transformers, config)(**shared, **options)))


def at_random(build):
    """Return ``build`` with float64 weights that are the same at every call, none of them at zero or one."""

    def build_at_random():
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.double()

    return build_at_random


def dealt(rows, *sizes):
    """Return the parts of ``rows`` that were dealt in turns: ``sizes[0]`` rows to the first, ``sizes[1]`` ..."""
    turns = rows.unflatten(0, (-1, sum(sizes)))
    return [part.flatten(0, 1) for part in turns.split(sizes, dim=1)]


def linear(weight, bias=None):
    """Return a Linear with a copy of ``weight``, (out, in), and of ``bias``."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def plain_groups(model):
    """Return groups written by hand: rows of Linears are neurons; head, routers and the rest are AdamW's."""
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    matrices = {module.weight for module in linears if module.out_features > 1}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [(name, parameter) for name, parameter in named if parameter in matrices]},
        {"params": [(name, parameter) for name, parameter in named if parameter not in matrices], "algorithm": "adamw"},
    ]


def head_by_head(model, heads):
    """Return a copy of an unfused model in which every head of the Linears named in ``heads`` is a Linear."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        role = name.split(".")[-1]
        if role in heads and isinstance(module, nn.Linear):  # the router of Qwen3-Next is called gate, too
            model.set_submodule(name, Heads(module, heads[role]))
    return model


class Heads(nn.ModuleList):
    """A Linear as a list of Linears of ``size`` rows."""

    def __init__(self, whole, size):
        biases = [None] * (whole.out_features // size) if whole.bias is None else whole.bias.split(size)
        super().__init__(map(linear, whole.weight.split(size), biases))

    def forward(self, inputs):
        return torch.cat([head(inputs) for head in self], dim=-1)


# --- architectures of transformers that compute the same ---


def twin(build, renamed, fused, prepare=lambda name, tensor: tensor):
    """Return a function that loads the weights of a fused model into the model that ``build`` returns.

    Args:
        build: Returns the unfused model.
        renamed: Pairs of a part of a name and what replaces it, in order.
        fused: Name of a fused module after renaming -> names of the unfused ones, and the function that takes the
            fused rows apart, one part for each.
        prepare: Turns a tensor of the fused model into what the other one stores, before anything else.
    """

    def unfuse(model):
        weights = {}
        for name, tensor in model.state_dict().items():
            tensor = prepare(name, tensor)
            for old, new in renamed:
                name = name.replace(old, new)
            for whole, (parts, split) in fused.items():
                if f".{whole}." in name:
                    tensors = split(tensor)
                    assert len(tensors) == len(parts)
                    weights |= {
                        name.replace(f".{whole}.", f".{part}."): rows for part, rows in zip(parts, tensors, strict=True)
                    }
                    break
            else:
                weights[name] = tensor
        unfused = build()
        missing, unexpected = unfused.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.bias"}  # Phi and GPT-J have one where the fused model has none
        if missing:
            nn.init.zeros_(unfused.lm_head.bias.requires_grad_(False))
        return unfused

    return unfuse


QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")

LLAMA_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 32,
}
LLAMA = hugging_face("LlamaForCausalLM", "LlamaConfig", **LLAMA_SIZES, rms_norm_eps=1e-5)
PHI3 = Case(
    build=hugging_face("Phi3ForCausalLM", "Phi3Config", **LLAMA_SIZES, original_max_position_embeddings=32),
    unfuse=twin(
        LLAMA,
        renamed=[],
        fused={
            "qkv_proj": (QUERY_KEY_VALUE, lambda rows: rows.split([40, 20, 20])),
            "gate_up_proj": (("gate_proj", "up_proj"), lambda rows: rows.split([38, 38])),
        },
    ),
    layouts={"qkv_proj.weight": "o=40+20+20 i", "gate_up_proj.weight": "o=38+38 i"},
    heads=dict.fromkeys(QUERY_KEY_VALUE, 10),
)


def as_opt(name, tensor):
    """Conv1D stores (in, out), and the table of OPT has two more rows before its first position."""
    if ".c_" in name and tensor.ndim == 2:
        return tensor.T
    return F.pad(tensor, (0, 0, 2, 0)) if name.endswith("wpe.weight") else tensor


GPT2 = Case(
    build=hugging_face(
        "GPT2LMHeadModel",
        "GPT2Config",
        n_embd=30,
        n_inner=38,
        n_layer=2,
        n_head=3,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    unfuse=twin(
        hugging_face(
            "OPTForCausalLM",
            "OPTConfig",
            hidden_size=30,
            ffn_dim=38,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=32,
            activation_function="gelu_new",
            dropout=0.0,
        ),
        renamed=[
            ("transformer.wte", "model.decoder.embed_tokens"),
            ("transformer.wpe", "model.decoder.embed_positions"),
            ("transformer.ln_f", "model.decoder.final_layer_norm"),
            ("transformer.h.", "model.decoder.layers."),
            ("ln_1", "self_attn_layer_norm"),
            ("ln_2", "final_layer_norm"),
            ("attn.c_attn", "self_attn.c_attn"),
            ("attn.c_proj", "self_attn.out_proj"),
            ("mlp.c_fc", "fc1"),
            ("mlp.c_proj", "fc2"),
        ],
        fused={"c_attn": (QUERY_KEY_VALUE, lambda rows: rows.split([30, 30, 30]))},
        prepare=as_opt,
    ),
    layouts={"c_attn.weight": "i o=30+30+30"},
    heads=dict.fromkeys(QUERY_KEY_VALUE, 10),
)


def phi_twin(key_heads, rotary, renamed, split):
    """Return the twin of a model whose attention and MLP stand side by side behind one norm, with biases."""
    build = hugging_face(
        "PhiForCausalLM",
        "PhiConfig",
        hidden_size=40,
        intermediate_size=46,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        partial_rotary_factor=rotary,
        max_position_embeddings=32,
        hidden_act="gelu",
    )
    names = [("dense_h_to_4h", "fc1"), ("dense_4h_to_h", "fc2"), *renamed]
    return twin(build, names, {"query_key_value": (QUERY_KEY_VALUE, split)})


def gpt_neox():
    """GPT-NeoX whose two norms are one module, which makes it a Phi."""
    model = hugging_face(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        hidden_size=40,
        intermediate_size=46,
        num_hidden_layers=2,
        num_attention_heads=4,
        rotary_pct=0.4,
        max_position_embeddings=32,
    )()
    for layer in model.gpt_neox.layers:
        layer.post_attention_layernorm = layer.input_layernorm
    return model


GPT_NEOX = Case(
    build=gpt_neox,
    unfuse=phi_twin(
        key_heads=4,
        rotary=0.4,
        renamed=[
            ("gpt_neox.embed_in", "model.embed_tokens"),
            ("gpt_neox.final_layer_norm", "model.final_layernorm"),
            ("gpt_neox.layers", "model.layers"),
            ("post_attention_layernorm", "input_layernorm"),
            ("attention.", "self_attn."),
        ],
        split=lambda rows: dealt(rows, 10, 10, 10),
    ),
    layouts={"query_key_value.weight": "o%10+10+10 i"},
    heads=dict.fromkeys(QUERY_KEY_VALUE, 10),
)


def falcon(key_heads, split, layout, **options):
    return Case(
        build=hugging_face(
            "FalconForCausalLM",
            "FalconConfig",
            hidden_size=40,
            ffn_hidden_size=46,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=key_heads,
            bias=True,
            parallel_attn=True,
            num_ln_in_parallel_attn=1,
            tie_word_embeddings=False,
            max_position_embeddings=32,
            **options,
        ),
        unfuse=phi_twin(
            key_heads=key_heads,
            rotary=1.0,
            renamed=[
                ("transformer.word_embeddings", "model.embed_tokens"),
                ("transformer.ln_f", "model.final_layernorm"),
                ("transformer.h.", "model.layers."),
                ("self_attention.", "self_attn."),
            ],
            split=split,
        ),
        layouts={"query_key_value.weight": layout},
        heads=dict.fromkeys(QUERY_KEY_VALUE, 10),
    )


# three orders of the same rows, told apart by two flags of the config
FALCON_ONE_KEY_HEAD = falcon(1, lambda rows: rows.split([40, 10, 10]), "o=40+10+10 i", multi_query=True)
FALCON_PER_HEAD = falcon(4, lambda rows: dealt(rows, 10, 10, 10), "o%10+10+10 i", multi_query=False)
FALCON_GROUPED = falcon(2, lambda rows: dealt(rows, 20, 10, 10), "o%20+10+10 i", new_decoder_architecture=True)


def of_codegen(rows):
    """CodeGen keeps four shards, each with a part of the queries, values and keys, in this order."""
    query, value, key = dealt(rows, 6, 6, 6)
    return query, key, value


GPTJ_SIZES = {"n_embd": 24, "n_inner": 38, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4}
CODEGEN = Case(
    build=hugging_face("CodeGenForCausalLM", "CodeGenConfig", **GPTJ_SIZES, n_ctx=32),
    unfuse=twin(
        hugging_face("GPTJForCausalLM", "GPTJConfig", **GPTJ_SIZES),
        renamed=[],
        fused={"qkv_proj": (QUERY_KEY_VALUE, of_codegen)},
    ),
    layouts={"qkv_proj.weight": "o%6+6+6 i"},
    heads=dict.fromkeys(QUERY_KEY_VALUE, 6),
    tolerance=1e-6,
)


# --- modules written out, one Linear per role ---


def replaced(model, kind, make):
    """Return a copy of ``model`` with ``make(module)`` in place of every module of the class called ``kind``."""
    model = copy.deepcopy(model)
    places = [name for name, module in model.named_modules() if type(module).__name__ == kind]
    assert places
    for place in places:
        model.set_submodule(place, make(model.get_submodule(place)))
    return model


def into_heads(tensor, count):
    """(batch, length, heads * size) -> (batch, heads, length, size)."""
    return tensor.unflatten(-1, (count, -1)).transpose(1, 2)


def out_of_heads(tensor):
    return tensor.transpose(1, 2).flatten(2)


def rotated(tensor, cos, sin):
    """Rotary positions on as many of the first channels as ``cos`` has."""
    turning, staying = tensor[..., : cos.shape[-1]], tensor[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return torch.cat([turned, staying], dim=-1)


class BloomAttention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.heads, self.dense = fused.num_heads, fused.dense
        size = fused.head_dim
        weights, biases = (dealt(rows, size, size, size) for rows in fused.query_key_value.parameters())
        self.query, self.key, self.value = map(linear, weights, biases)

    def forward(self, hidden, residual, alibi, attention_mask, **_):
        query, key, value = (into_heads(role(hidden), self.heads) for role in (self.query, self.key, self.value))
        scores = query @ key.mT / query.shape[-1] ** 0.5 + alibi.unflatten(0, (-1, self.heads)) + attention_mask
        return self.dense(out_of_heads(scores.softmax(-1, torch.float32).to(value) @ value)) + residual, None


BLOOM = Case(
    build=hugging_face(
        "BloomForCausalLM",
        "BloomConfig",
        hidden_size=30,
        n_layer=2,
        n_head=3,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    ),
    unfuse=lambda model: replaced(model, "BloomAttention", BloomAttention),
    layouts={"query_key_value.weight": "o%10+10+10 i"},
    heads=dict.fromkeys(("query", "key", "value"), 10),
)


class Expert(nn.Module):
    """Gate and up, activated, then down.

    Args:
        weights: Of gate, up and down, each (out, in).
        activate: What becomes of the outputs of gate and up.
        biases: Of gate, up and down.
    """

    def __init__(self, weights, activate, biases=(None, None, None)):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(linear, weights, biases)
        self.activate = activate

    def forward(self, hidden):
        return self.down_proj(self.activate(self.gate_proj(hidden), self.up_proj(hidden)))


def swiglu(gate, up):
    return F.silu(gate) * up


class ExpertList(nn.Module):
    """Experts one after the other, each for its own tokens.

    One without a token takes part with none: its gradient is then zero, like that of its slice of a stacked weight, not
    None.
    """

    def __init__(self, experts):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, hidden, chosen, shares):
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            result = result.index_add(0, token, expert(hidden[token]) * shares[token, place, None].to(hidden))
        return result


def experts(fused):
    """Mixtral, DeepSeek, Qwen: (experts, out, in), the gate in the first half of the neurons."""
    return ExpertList(
        Expert([*gate_up.chunk(2), down], swiglu)
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True)
    )


MIXTRAL = Case(
    build=hugging_face(
        "MixtralForCausalLM",
        "MixtralConfig",
        **{**LLAMA_SIZES, "intermediate_size": 14},
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
    ),
    unfuse=lambda model: replaced(model, "MixtralExperts", experts),
    layouts={"experts.gate_up_proj": "e o=14+14 i", "experts.down_proj": "e o i"},
    heads=dict.fromkeys(QUERY_KEY_VALUE, 10),
)


def gpt_oss_swiglu(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def gpt_oss_experts(fused):
    """(experts, in, out), even neurons the gate's and odd ones up's, with biases."""
    stacks = (fused.gate_up_proj, fused.gate_up_proj_bias, fused.down_proj, fused.down_proj_bias)
    return ExpertList(
        Expert(
            [weight[:, ::2].T, weight[:, 1::2].T, down.T],
            gpt_oss_swiglu,
            [bias[::2], bias[1::2], down_bias],
        )
        for weight, bias, down, down_bias in zip(*stacks, strict=True)
    )


GPT_OSS = Case(
    build=hugging_face(
        "GptOssForCausalLM",
        "GptOssConfig",
        **{**LLAMA_SIZES, "intermediate_size": 14},
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        sliding_window=6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    unfuse=lambda model: replaced(model, "GptOssExperts", gpt_oss_experts),
    layouts={"experts.gate_up_proj": "e i o%1+1", "experts.down_proj": "e i o"},
    heads=dict.fromkeys(QUERY_KEY_VALUE, 10),
)


class Llama4Experts(nn.Module):
    """(experts, in, out), the gate in the first half of the neurons; every expert sees every token, scaled."""

    def __init__(self, fused):
        super().__init__()
        self.experts = nn.ModuleList(
            Expert([*gate_up.T.chunk(2), down.T], swiglu)
            for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True)
        )

    def forward(self, hidden):
        parts = hidden.chunk(len(self.experts))
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])


LLAMA4 = Case(
    build=hugging_face(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        **{**LLAMA_SIZES, "intermediate_size": 14},
        intermediate_size_mlp=38,
        interleave_moe_layer_step=2,  # one layer with experts, one without
        no_rope_layer_interval=2,
        num_local_experts=4,
        num_experts_per_tok=1,
        attention_chunk_size=8,
    ),
    unfuse=lambda model: replaced(model, "Llama4TextExperts", Llama4Experts),
    layouts={"experts.gate_up_proj": "e i o=14+14", "experts.down_proj": "e i o"},
    heads=dict.fromkeys(QUERY_KEY_VALUE, 10),
)


class LatentAttention(nn.Module):
    """Multi-head latent attention (MLA) of DeepSeek-V3."""

    def __init__(self, fused):
        super().__init__()
        self.heads, self.scaling = fused.num_heads, fused.scaling
        self.q_a_proj, self.q_a_layernorm, self.q_b_proj = fused.q_a_proj, fused.q_a_layernorm, fused.q_b_proj
        self.kv_a_layernorm, self.o_proj = fused.kv_a_layernorm, fused.o_proj
        self.latent, self.rotary_key = map(linear, fused.kv_a_proj_with_mqa.weight.split([10, 4]))
        self.key, self.value = map(linear, dealt(fused.kv_b_proj.weight, 6, 8))

    def forward(self, hidden_states, position_embeddings, **_):
        query = into_heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states))), self.heads)
        latent = self.kv_a_layernorm(self.latent(hidden_states))
        key, value = (into_heads(role(latent), self.heads) for role in (self.key, self.value))
        rotary_key = rotated(self.rotary_key(hidden_states)[:, None], *position_embeddings)
        query = torch.cat([query[..., :6], rotated(query[..., 6:], *position_embeddings)], dim=-1)
        key = torch.cat([key, rotary_key.expand(-1, self.heads, -1, -1)], dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scaling)
        return self.o_proj(out_of_heads(mixed)), None


DEEPSEEK = Case(
    build=hugging_face(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        hidden_size=24,
        intermediate_size=38,
        moe_intermediate_size=14,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=15,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        rope_interleave=False,
        max_position_embeddings=32,
        num_mtp_layers=0,
    ),
    unfuse=lambda model: replaced(
        replaced(model, "DeepseekV3Attention", LatentAttention), "DeepseekV3Experts", experts
    ),
    layouts={
        "kv_a_proj_with_mqa.weight": "o=10+4 i",
        "kv_b_proj.weight": "o%6+8 i",
        "experts.gate_up_proj": "e o=14+14 i",
        "experts.down_proj": "e o i",
    },
    heads={"q_b_proj": 10, "key": 6, "value": 8},
)


class GatedAttention(nn.Module):
    """Attention of Qwen3-Next, whose query brings a gate for the output of its head."""

    def __init__(self, fused):
        super().__init__()
        self.size = fused.head_dim
        self.query, self.gate = map(linear, dealt(fused.q_proj.weight, self.size, self.size))
        self.k_proj, self.v_proj, self.o_proj = fused.k_proj, fused.v_proj, fused.o_proj
        self.q_norm, self.k_norm = fused.q_norm, fused.k_norm

    def forward(self, hidden_states, position_embeddings, **_):
        projections = (self.query, self.k_proj, self.v_proj)
        query, key, value = (role(hidden_states).unflatten(-1, (-1, self.size)) for role in projections)
        query, key = (norm(role).transpose(1, 2) for norm, role in ((self.q_norm, query), (self.k_norm, key)))
        query, key = (rotated(role, *position_embeddings) for role in (query, key))
        value = value.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out_of_heads(mixed) * self.gate(hidden_states).sigmoid()), None


class Roles(nn.ModuleDict):
    """Linears that read the same input; returns a list of what each gives."""

    def forward(self, inputs):
        return [role(inputs) for role in self.values()]


def gated_delta_net(fused):
    """Linear attention of Qwen3-Next: the function that sorts fused projections is given sorted ones."""
    keys, values, shared = fused.head_k_dim, fused.head_v_dim, fused.num_v_heads // fused.num_k_heads
    parts = dealt(fused.in_proj_qkvz.weight, keys, keys, shared * values, shared * values)
    names = ("linear_query", "linear_key", "linear_value", "linear_gate")
    fused.in_proj_qkvz = Roles(zip(names, map(linear, parts), strict=True))
    beta_alpha = dealt(fused.in_proj_ba.weight, shared, shared)
    fused.in_proj_ba = Roles(zip(("beta", "alpha"), map(linear, beta_alpha), strict=True))

    def sort(query_key_value_z, beta_alpha):
        sizes = (keys, keys, values, values)
        by_head = [role.unflatten(-1, (-1, size)) for role, size in zip(query_key_value_z, sizes, strict=True)]
        return *by_head, *beta_alpha

    fused.fix_query_key_value_ordering = sort
    return fused


def unfused_qwen3_next(model):
    for kind, make in (
        ("Qwen3NextAttention", GatedAttention),
        ("Qwen3NextGatedDeltaNet", gated_delta_net),
        ("Qwen3NextExperts", experts),
    ):
        model = replaced(model, kind, make)
    return model


QWEN3_NEXT = Case(
    build=hugging_face(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        **{**LLAMA_SIZES, "head_dim": 8},
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=7,
        linear_value_head_dim=5,
        moe_intermediate_size=14,
        shared_expert_intermediate_size=18,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    unfuse=unfused_qwen3_next,
    layouts={
        "q_proj.weight": "o%8+8 i",
        "in_proj_qkvz.weight": "o%7+7+15+15 i",
        "in_proj_ba.weight": "o%3+3 i",
        "experts.gate_up_proj": "e o=14+14 i",
        "experts.down_proj": "e o i",
    },
    heads={
        **dict.fromkeys(("query", "gate", "k_proj", "v_proj"), 8),
        **dict.fromkeys(("linear_query", "linear_key"), 7),
        **dict.fromkeys(("linear_value", "linear_gate"), 5),
    },
)


class MambaMixer(nn.Module):
    """The recurrence of Mamba, one position at a time."""

    def __init__(self, fused):
        super().__init__()
        rank, states = fused.time_step_rank, fused.ssm_state_size
        self.conv1d, self.dt_proj, self.out_proj = fused.conv1d, fused.dt_proj, fused.out_proj
        self.A_log, self.D = fused.A_log, fused.D
        self.inputs, self.gate = map(linear, fused.in_proj.weight.chunk(2))
        self.step, self.into, self.out_of = map(linear, fused.x_proj.weight.split([rank, states, states]))

    def forward(self, hidden_states, **_):
        length = hidden_states.shape[1]
        inputs = F.silu(self.conv1d(self.inputs(hidden_states).mT)[..., :length].mT)
        step = F.softplus(self.dt_proj(self.step(inputs)))
        into, out_of, decay = self.into(inputs), self.out_of(inputs), -self.A_log.exp()
        state, outputs = 0, []
        for now in range(length):
            change = step[:, now, :, None] * into[:, now, None, :] * inputs[:, now, :, None]
            state = (step[:, now, :, None] * decay).exp() * state + change
            outputs.append((state * out_of[:, now, None, :]).sum(-1))
        mixed = torch.stack(outputs, dim=1) + self.D * inputs
        return self.out_proj(mixed * F.silu(self.gate(hidden_states)))


MAMBA = Case(
    build=hugging_face(
        "MambaForCausalLM",
        "MambaConfig",
        hidden_size=18,
        state_size=5,
        num_hidden_layers=2,
        time_step_rank=3,
        tie_word_embeddings=False,
    ),
    unfuse=lambda model: replaced(model, "MambaMixer", MambaMixer),
    layouts={"in_proj.weight": "o=36+36 i", "x_proj.weight": "o=3+5+5 i"},
    tolerance=1e-6,
)


class TokenModel(nn.Module):
    """Embedding, two layers of attention with a residual, head; for attention that comes without a model."""

    def __init__(self, attention):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 30)
        self.layers = nn.ModuleList(attention() for _ in range(2))
        self.head = nn.Linear(30, VOCABULARY)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        logits = self.head(hidden)
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


class Attention(nn.Module):
    """Attention as vision models of timm write it."""

    def __init__(self, dim=30, num_heads=3):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class SelfAttention(nn.MultiheadAttention):
    """torch's attention with one input."""

    def __init__(self):
        super().__init__(30, 3, batch_first=True)

    def forward(self, inputs):
        return super().forward(inputs, inputs, inputs, need_weights=False)[0]


class PlainAttention(nn.Module):
    def __init__(self, weight, bias, out, heads):
        super().__init__()
        self.query, self.key, self.value = map(linear, weight.chunk(3), bias.chunk(3))
        self.out, self.heads = out, heads

    def forward(self, inputs):
        query, key, value = (into_heads(role(inputs), self.heads) for role in (self.query, self.key, self.value))
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        return self.out(out_of_heads(weights @ value))


TIMM = Case(
    build=at_random(lambda: TokenModel(Attention)),
    unfuse=lambda model: replaced(
        model, "Attention", lambda fused: PlainAttention(fused.qkv.weight, fused.qkv.bias, fused.proj, fused.num_heads)
    ),
    layouts={"qkv.weight": "o=30+30+30 i"},
    heads=dict.fromkeys(("query", "key", "value"), 10),
)
MULTIHEAD_ATTENTION = Case(
    build=at_random(lambda: TokenModel(SelfAttention)),
    unfuse=lambda model: replaced(
        model,
        "SelfAttention",
        lambda fused: PlainAttention(
            fused.in_proj_weight, fused.in_proj_bias, linear(*fused.out_proj.parameters()), fused.num_heads
        ),
    ),
    layouts={"in_proj_weight": "o=30+30+30 i"},
    heads=dict.fromkeys(("query", "key", "value"), 10),
)

MIXTURES = {"Mixtral": MIXTRAL, "gpt-oss": GPT_OSS, "Llama 4": LLAMA4, "DeepSeek-V3": DEEPSEEK}
CASES = {
    "Phi-3": PHI3,
    "GPT-2": GPT2,
    "GPT-NeoX": GPT_NEOX,
    "Falcon, one key head": FALCON_ONE_KEY_HEAD,
    "Falcon, interleaved by head": FALCON_PER_HEAD,
    "Falcon, interleaved by group": FALCON_GROUPED,
    "CodeGen": CODEGEN,
    "Bloom": BLOOM,
    **MIXTURES,
    "Qwen3-Next": QWEN3_NEXT,
    "Mamba": MAMBA,
    "timm": TIMM,
    "MultiheadAttention": MULTIHEAD_ATTENTION,
}
