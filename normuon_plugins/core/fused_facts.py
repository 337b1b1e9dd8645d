"""Facts about fused weights: which neurons of one weight belong to which projection, and which to which head.

Shapes and attributes tell how large the projections are; whether they stand one after the other or are dealt in turns
is written in the ``forward`` of the module and nowhere else. So this file is a table, and the only one that knows
modules by name. A fact counts only where its sizes fit the weight. The source of each is the file of transformers 5.23
named above it (``models/<folder>/modeling_<folder>.py``), or what is named instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Sizes = Sequence[int]
# What attention modules and their configs call the neurons of a head, the number of heads, and their product.
HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "dim_head", "key_value_proj_dim", "d_kv")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "groups")
WIDTHS = ("embed_dim", "dim", "hidden_size_output", "all_head_size", "split_size", "hidden_size", "n_embd")


class Fact(NamedTuple):
    """One line of the table.

    Attributes:
        attribute: What the holder calls the weight, or the layer that has it.
        holders: Class names (of the module or one of its bases); empty: any module that has the attributes read here.
        sizes: The holder and the number of neurons -> neurons of each block.
        heads: The holder -> neurons of one head, for all blocks or for each; None: no heads.
        interleaved: Whether the blocks are dealt in turns.
    """

    attribute: str
    holders: tuple[str, ...]
    sizes: Callable[[Any, int], Sizes]
    heads: Callable[[Any], int | Sizes] | None = None
    interleaved: bool = False


def _parts(count: int) -> Callable[[Any, int], Sizes]:
    """Return the rule that divides a weight into ``count`` equal blocks."""
    return lambda m, neurons: [neurons // count] * count if neurons % count == 0 else ()


def _chunks(m: Any, neurons: int) -> Sizes:
    return _parts(m.num_chunks)(m, neurons)


def _turns(size: Callable[[Any], int], count: int = 3) -> Callable[[Any, int], Sizes]:
    """Return the rule of ``count`` equal pieces in a turn."""
    return lambda m, neurons: [size(m)] * count


def first_number(m: Any, names: Sequence[str]) -> int:
    """Return the first of these attributes of a module, or of its config, that is a number; 0 if none is."""
    for source in (m, getattr(m, "config", None)):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return 0


def _head(m: Any) -> int:
    """Return the neurons of one head of an attention module, 0 if it does not say."""
    size = first_number(m, HEAD_SIZES)
    count = first_number(m, HEAD_COUNTS)
    return size or (first_number(m, WIDTHS) // count if count else 0)


def _query_key_value(m: Any, neurons: int) -> Sizes:
    """Queries, then keys, then values, with fewer key and value heads where the module says so."""
    kv = first_number(m, ("num_key_value_heads", "num_kv_heads")) * _head(m)
    return [neurons - 2 * kv, kv, kv] if 0 < 3 * kv < neurons else _parts(3)(m, neurons)


def _mamba2(m: Any, neurons: int) -> Sizes:
    """Gate, x, B, C and dt."""
    states = m.n_groups * m.ssm_state_size
    return [m.intermediate_size, m.intermediate_size, states, states, m.num_heads]


def _latent_and_rope(m: Any, neurons: int) -> Sizes:
    return [m.kv_lora_rank, m.qk_rope_head_dim]


# One head of each block makes a turn, so that these are sizes and heads at once.


def _key_and_value(m: Any, neurons: int = 0) -> Sizes:
    return [m.qk_nope_head_dim, m.v_head_dim]


def _query_and_gate(m: Any, neurons: int = 0) -> Sizes:
    return [m.qk_head_dim, m.v_head_dim]


def _levit_key_and_value(m: Any, neurons: int = 0) -> Sizes:
    return [m.key_dim, m.attention_ratio * m.key_dim]


def _levit_query_key_value(m: Any, neurons: int = 0) -> Sizes:
    return [m.key_dim, *_levit_key_and_value(m)]


def _value_heads_per_key(m: Any) -> int:
    return int(m.num_v_heads // m.num_k_heads)


def _half_of_mamba1(m: Any, neurons: int) -> Sizes:
    """X and its gate; Mamba-1 knows ``time_step_rank``, and Mamba-2 has more in this weight."""
    return [m.intermediate_size] * 2 if m.time_step_rank else ()


# Facts about named modules: only forward tells the order.
NAMED = (
    # bloom, gpt_neox, gpt_neox_japanese, persimmon: view(..., heads, 3 * head) or (..., heads, 3, head)
    Fact(
        "query_key_value",
        ("BloomAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "PersimmonAttention"),
        _turns(_head),
        _head,
        interleaved=True,
    ),
    # falcon: _split_heads; num_kv_heads is num_heads, or 1, where the weight has no groups
    Fact(
        "query_key_value",
        ("FalconAttention",),
        lambda m, neurons: (
            [m.num_heads // m.num_kv_heads * m.head_dim, m.head_dim, m.head_dim]
            if m.new_decoder_architecture or m.multi_query
            else [m.head_dim] * 3
        ),
        _head,
        interleaved=True,
    ),
    # minimax: view(..., heads, 3 * head_dim).split(head_dim)
    Fact("qkv_proj", ("MiniMaxLightningAttention",), _turns(_head), _head, interleaved=True),
    # codegen: four groups (mp_num), in each the queries, values and keys of a quarter of the heads
    Fact(
        "qkv_proj",
        ("CodeGenAttention",),
        _turns(lambda m: m.num_attention_heads * m.head_dim // 4),
        _head,
        interleaved=True,
    ),
    # gpt_bigcode: one head of keys and values, else per head
    Fact(
        "c_attn",
        ("GPTBigCodeAttention",),
        lambda m, neurons: [neurons - 2 * m.head_dim, m.head_dim, m.head_dim] if m.multi_query else [m.head_dim] * 3,
        _head,
        interleaved=True,
    ),
    # deberta: view(..., heads, 3 * head).chunk(3)
    Fact("in_proj", ("DisentangledSelfAttention",), _turns(_head), _head, interleaved=True),
    # levit: view(..., heads, -1).split([key_dim, key_dim, attention_ratio * key_dim])
    Fact("queries_keys_values", ("LevitAttention",), _levit_query_key_value, _levit_query_key_value, interleaved=True),
    Fact("keys_values", ("LevitAttentionSubsample",), _levit_key_and_value, _levit_key_and_value, interleaved=True),
    # esm (folding): per head
    Fact("proj", ("EsmFoldSelfAttention",), _turns(lambda m: m.head_width), lambda m: m.head_width, interleaved=True),
    Fact(
        "linear_kv",
        ("EsmFoldInvariantPointAttention",),
        _turns(lambda m: m.hidden_dim, 2),
        lambda m: m.hidden_dim,
        interleaved=True,
    ),
    # mobilevitv2: one query, then keys and values
    Fact("qkv_proj", ("MobileViTV2LinearSelfAttention",), lambda m, neurons: [1, m.embed_dim, m.embed_dim]),
    # qwen3_next, qwen3_5, qwen3_5_moe, qwen4_exp: view(..., heads, 2 * head_dim).chunk(2): query and output gate
    Fact(
        "q_proj",
        ("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen4ExpTextAttention"),
        _turns(_head, 2),
        _head,
        interleaved=True,
    ),
    # a_x_k2: query and output gate of each head
    Fact("q_gate_proj", ("AXK2Attention",), _query_and_gate, _query_and_gate, interleaved=True),
    # zamba: view(..., heads, -1, 2): x and its gate alternate
    Fact("in_proj", ("ZambaMambaMixer",), lambda m, neurons: [1, 1], interleaved=True),
    # lfm2, lfm2_moe, lfm3, lfm3_vl: B, C, x = chunk(3)
    Fact("in_proj", ("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv", "Lfm3VlVisionShortConv"), _parts(3)),
    # modernbert, modernbert_decoder: input, gate = chunk(2)
    Fact("Wi", ("ModernBertMLP", "ModernBertDecoderMLP"), _parts(2)),
    # moshi, kyutai_speech_to_text: view(..., 2, -1); moonshine, moonshine_streaming: chunk(2)
    Fact(
        "fc1",
        ("MoshiGatingMLP", "KyutaiSpeechToTextGatingMLP", "MoonshineDecoderMLP", "MoonshineStreamingDecoderMLP"),
        _parts(2),
    ),
    # granitemoeshared, granitemoehybrid, granitemoe_swa: chunk(2)
    Fact("input_linear", ("GraniteMoeSharedMLP", "GraniteMoeHybridMLP", "GraniteMoeSWAMLP", "JetMoeMoE"), _parts(2)),
    # clvp, aya_vision, cohere2_vision: chunk(2)
    Fact("proj", ("ClvpGatedLinearUnit", "EsmFoldSequenceToPair"), _parts(2)),
    Fact("linear_1", ("AyaVisionMultiModalProjector", "Cohere2VisionMultiModalProjector"), _parts(2)),
    # xlstm: gate and up of the feed-forward
    Fact("proj_up_gate_z", ("xLSTMFeedForward",), _parts(2)),
    # focalnet: query, context and a gate per level
    Fact("projection_in", ("FocalNetModulation",), lambda m, neurons: [m.dim, m.dim, m.focal_level + 1]),
    # jetmoe: key and value
    Fact("kv_proj", ("JetMoeAttention",), _parts(2), _head),
    # pp_doclayout_v2, pp_doclayout_v3: query and key
    Fact("dense", ("PPDocLayoutV2GlobalPointer", "PPDocLayoutV3GlobalPointer"), _parts(2), lambda m: m.head_size),
    # qwen4_exp: query and key of the indexer
    Fact(
        "index_qk_proj",
        ("Qwen4ExpTextQSAIndexer",),
        lambda m, neurons: [m.index_n_heads * m.index_head_dim, m.index_kv_heads * m.index_head_dim],
        lambda m: m.index_head_dim,
    ),
    # zaya: query and key
    Fact(
        "conv_qk_grouped",
        ("ZayaCCAProjection",),
        lambda m, neurons: [m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim],
        _head,
    ),
    # esm (ESMFold 2): six, four and two signals
    Fact("adaln_linear", ("EsmFold2AtomLayer",), _parts(6)),
    Fact("proj_bundle", ("EsmFold2TriangleMultiplicativeUpdate",), _parts(4)),
    Fact("input_proj", ("EsmFold2OuterProductMean",), _parts(2)),
    # qwen2_5_omni, vibevoice, pocket_tts, gradium_phonon_tts: shift, scale and gate of adaptive norms
    Fact("linear", ("Qwen2_5_OmniAdaLayerNormZero",), _parts(6)),
    Fact("linear", ("Qwen2_5_OmniAdaLayerNormZero_Final",), _parts(2)),
    Fact("linear", ("VibeVoiceDiffusionHeadAdaLayerNorm",), _chunks),
    Fact("linear_1", ("VibeVoiceDiffusionHeadFinalLayer",), _chunks),
    Fact(
        "adaln_proj",
        (
            "PocketTTSFlowResBlock",
            "PocketTTSFlowFinalLayer",
            "GradiumPhononTTSFlowResBlock",
            "GradiumPhononTTSFlowFinalLayer",
        ),
        _chunks,
    ),
    # gated linear units of the audio encoders: nn.GLU, F.glu or chunk(2): value and gate
    Fact(
        "pointwise_conv1",
        (
            "FastSpeech2ConformerConvolutionModule",
            "LasrEncoderConvolutionModule",
            "NemotronAsrStreamingEncoderConvolutionModule",
            "ParakeetEncoderConvolutionModule",
            "SeamlessM4TConformerConvolutionModule",
            "SeamlessM4Tv2ConformerConvolutionModule",
            "Wav2Vec2BertConvolutionModule",
            "Wav2Vec2ConformerConvolutionModule",
        ),
        _parts(2),
    ),
    Fact("pointwise_lin1", ("GraniteSpeech5EncoderConvolutionModule",), _parts(2)),
    Fact("up_conv", ("GraniteSpeechConformerConvModule", "GraniteSpeechPlusConformerConvModule"), _parts(2)),
    Fact("linear_start", ("Gemma3nAudioConformerLightConv1d", "Gemma4AudioLightConv1d"), _parts(2)),
    Fact("ext_pw_conv_1d", ("Phi4MultimodalAudioGluPointWiseConv",), _parts(2)),
    Fact(
        "conv",
        (
            "Data2VecAudioAdapterLayer",
            "Wav2Vec2AdapterLayer",
            "Wav2Vec2ConformerAdapterLayer",
            "WavLMAdapterLayer",
        ),
        _parts(2),
    ),
    *(
        Fact(
            attribute,
            ("SeamlessM4TConformerAdapterLayer", "SeamlessM4Tv2ConformerAdapterLayer", "Wav2Vec2BertAdapterLayer"),
            _parts(2),
        )
        for attribute in ("residual_conv", "self_attn_conv")
    ),
)

# Facts about modules of any name: the attribute, with those that its sizes are read from, says enough.
COMMON = (
    # gpt_oss: gate and up alternate; integrations/moe.py says so of every expert module that it decorates
    Fact("gate_up_proj", (), lambda m, neurons: [1, 1] if m.is_concatenated is False else (), interleaved=True),
    # phi3 and 12 others, and 66 expert modules: chunk(2)
    Fact("gate_up_proj", (), _parts(2)),
    # deepseek_v3 and 16 others with multi-head latent attention
    Fact("kv_a_proj_with_mqa", (), _latent_and_rope),
    Fact("kv_b_proj", (), _key_and_value, _key_and_value, interleaved=True),
    # phi3, phi4_multimodal; vLLM and most others order them so, too
    Fact("qkv_proj", (), _query_key_value, _head),
    # 42 vision attentions of transformers, timm's Attention; reshape(batch, tokens, 3, heads, -1)
    Fact("qkv", (), _query_key_value, _head),
    # mpt, dbrx, modernbert, and flash-attn's MHA
    Fact("Wqkv", (), _query_key_value, _head),
    # layoutlmv2, bark
    Fact("qkv_linear", (), _query_key_value, _head),
    Fact("att_proj", (), _query_key_value, _head),
    # gpt2, imagegpt, decision_transformer, openai, nanoGPT: query, key, value; a cross-attention has the last two
    Fact(
        "c_attn",
        (),
        lambda m, neurons: _parts(2 if getattr(m, "is_cross_attention", False) else 3)(m, neurons),
        _head,
    ),
    # granite_speech, evolla: key and value
    Fact("to_kv", (), _parts(2), _head),
    # qwen3_next: linear attention, dealt by key heads
    Fact(
        "in_proj_qkvz",
        (),
        lambda m, neurons: [m.head_k_dim] * 2 + [_value_heads_per_key(m) * m.head_v_dim] * 2,
        lambda m: [m.head_k_dim, m.head_k_dim, m.head_v_dim, m.head_v_dim],
        interleaved=True,
    ),
    Fact("in_proj_ba", (), lambda m, neurons: [_value_heads_per_key(m)] * 2, interleaved=True),
    # qwen3_5, qwen3_5_moe, qwen4_exp
    Fact(
        "in_proj_qkv",
        (),
        lambda m, neurons: [m.key_dim, m.key_dim, m.value_dim],
        lambda m: [m.head_k_dim, m.head_k_dim, m.head_v_dim],
    ),
    # xlstm: query, key, value and output gate
    Fact("qkv_opreact", (), lambda m, neurons: [m.qk_dim, m.qk_dim, m.v_dim, m.v_dim]),
    Fact("ifgate_preact", (), _parts(2)),
    # mamba2, bamba, falcon_h1, granitemoehybrid, nemotron_h, zamba2
    Fact("in_proj", (), _mamba2),
    # mamba, falcon_mamba, jamba
    Fact("in_proj", (), _half_of_mamba1),
    Fact("x_proj", (), lambda m, neurons: [m.time_step_rank, m.ssm_state_size, m.ssm_state_size]),
)

# Names under which attention modules keep an unfused projection.
QUERIES = ("q_proj", "query", "q_lin", "q_b_proj", "q", "wq", "to_q", "query_proj")
KEYS = ("k_proj", "key", "k_lin", "k", "wk", "to_k", "key_proj")
VALUES = ("v_proj", "value", "v_lin", "v", "wv", "to_v", "value_proj")

# Raw parameters that are projections: (class, attribute) -> layout.
RAW_PROJECTIONS = {
    # gemma3, t5gemma2: matmul(tokens, weight)
    ("Gemma3MultiModalProjector", "mm_input_projection_weight"): "i o",
    ("T5Gemma2MultiModalProjector", "mm_input_projection_weight"): "i o",
    # zamba: one Mamba per head
    ("ZambaMambaMixer", "x_proj_weight"): "e o i",
    ("ZambaMambaMixer", "dt_proj_weight"): "e o i",
    # recurrent_gemma: baddbmm(bias, tokens, weight), one per head
    ("RecurrentGemmaRglru", "input_gate_weight"): "e i o",
    ("RecurrentGemmaRglru", "recurrent_gate_weight"): "e i o",
    # xlnet: einsum("ibh,hnd->ibnd") for all but o; heads are matrices of their own, as a layout has one neuron axis
    ("XLNetRelativeAttention", "q"): "i e o",
    ("XLNetRelativeAttention", "k"): "i e o",
    ("XLNetRelativeAttention", "v"): "i e o",
    ("XLNetRelativeAttention", "r"): "i e o",
    ("XLNetRelativeAttention", "o"): "o i i",
    # funnel: einsum("td,dnh->tnh")
    ("FunnelRelMultiheadAttention", "r_kernel"): "i e o",
}
# x_proj_weight of zamba is fused like x_proj.
FUSED_RAW = {"x_proj_weight": "x_proj"}
