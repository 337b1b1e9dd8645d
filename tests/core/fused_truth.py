"""Which weights of transformers 5.23 are fused, read off the forward of every module; the truth of the tests.

(holder class, attribute) -> whether the blocks are dealt in turns, and their neurons. The comment names file and line.
"""

FUSED = {
    # falcon/modeling_falcon.py:_split_heads
    ("FalconAttention", "query_key_value"): (
        True,
        lambda m: (
            [m.num_heads // m.num_kv_heads * m.head_dim, m.head_dim, m.head_dim]
            if m.new_decoder_architecture
            else [m.num_heads * m.head_dim, m.head_dim, m.head_dim]
            if m.multi_query
            else [m.head_dim] * 3
        ),
    ),
    # afmoe/modeling_afmoe.py:166
    ("AfmoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # aria/modeling_aria.py:284
    ("AriaExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # axk1/modeling_axk1.py:390
    ("AXK1Attention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # axk1/modeling_axk1.py:396
    ("AXK1Attention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # axk1/modeling_axk1.py:184
    ("AXK1Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # axk2/modeling_axk2.py:533
    ("AXK2Attention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # axk2/modeling_axk2.py:539
    ("AXK2Attention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # axk2/modeling_axk2.py:529
    ("AXK2Attention", "q_gate_proj"): (True, lambda m: [m.qk_head_dim, m.v_head_dim]),
    # axk2/modeling_axk2.py:340
    ("AXK2Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # aya_vision/modeling_aya_vision.py:51
    ("AyaVisionMultiModalProjector", "linear_1"): (False, lambda m: [m.linear_1.out_features // 2] * 2),
    # bailing_hybrid/modeling_bailing_hybrid.py:312
    ("BailingHybridAttention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # bailing_hybrid/modeling_bailing_hybrid.py:318
    ("BailingHybridAttention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # bailing_hybrid/modeling_bailing_hybrid.py:154
    ("BailingHybridExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # bamba/modeling_bamba.py:624
    ("BambaMixer", "in_proj"): (
        False,
        lambda m: [
            m.intermediate_size,
            m.intermediate_size,
            m.n_groups * m.ssm_state_size,
            m.n_groups * m.ssm_state_size,
            m.num_heads,
        ],
    ),
    # bark/modeling_bark.py:90
    ("BarkSelfAttention", "att_proj"): (False, lambda m: [m.embed_dim, m.embed_dim, m.embed_dim]),
    # beam/modeling_beam.py:292
    ("BeamExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # blip/modeling_blip.py:302
    ("BlipAttention", "qkv"): (False, lambda m: [m.embed_dim, m.embed_dim, m.embed_dim]),
    # blip_2/modeling_blip_2.py:300
    ("Blip2Attention", "qkv"): (False, lambda m: [m.embed_dim, m.embed_dim, m.embed_dim]),
    # bloom/modeling_bloom.py:196
    ("BloomAttention", "query_key_value"): (True, lambda m: [m.head_dim] * 3),
    # clvp/modeling_clvp.py:394
    ("ClvpGatedLinearUnit", "proj"): (False, lambda m: [m.proj.out_features // 2] * 2),
    # codegen/modeling_codegen.py:85
    ("CodeGenAttention", "qkv_proj"): (True, lambda m: [m.num_attention_heads * m.head_dim // 4] * 3),
    # cohere2_moe/modeling_cohere2_moe.py:109
    ("Cohere2MoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # cohere2_vision/modeling_cohere2_vision.py:42
    ("Cohere2VisionMultiModalProjector", "linear_1"): (False, lambda m: [m.linear_1.out_features // 2] * 2),
    # cohere_compass/modeling_cohere_compass.py:745
    ("CohereCompassVisionAttention", "qkv"): (False, lambda m: [m.dim, m.dim, m.dim]),
    # data2vec/modeling_data2vec_audio.py:400
    ("Data2VecAudioAdapterLayer", "conv"): (False, lambda m: [m.conv.out_channels // 2] * 2),
    # dbrx/modeling_dbrx.py:187
    ("DbrxAttention", "Wqkv"): (
        False,
        lambda m: [m.hidden_size, m.num_key_value_heads * m.head_dim, m.num_key_value_heads * m.head_dim],
    ),
    # deberta/modeling_deberta.py:159
    ("DisentangledSelfAttention", "in_proj"): (True, lambda m: [m.attention_head_size] * 3),
    # decision_transformer/modeling_decision_transformer.py:97
    ("DecisionTransformerGPT2Attention", "c_attn"): (
        False,
        lambda m: [m.split_size] * (2 if m.is_cross_attention else 3),
    ),
    # deepseek_ocr2/modeling_deepseek_ocr2.py:185
    ("DeepseekOcr2SamVisionAttention", "qkv"): (
        False,
        lambda m: [m.qkv.out_features // 3, m.qkv.out_features // 3, m.qkv.out_features // 3],
    ),
    # deepseek_ocr2/modeling_deepseek_ocr2.py:1136
    ("DeepseekOcr2TextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # deepseek_v2/modeling_deepseek_v2.py:328
    ("DeepseekV2Attention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # deepseek_v2/modeling_deepseek_v2.py:334
    ("DeepseekV2Attention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # deepseek_v2/modeling_deepseek_v2.py:54
    ("DeepseekV2Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # deepseek_v3/modeling_deepseek_v3.py:387
    ("DeepseekV3Attention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # deepseek_v3/modeling_deepseek_v3.py:393
    ("DeepseekV3Attention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # deepseek_v3/modeling_deepseek_v3.py:170
    ("DeepseekV3Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # deepseek_v32/modeling_deepseek_v32.py:362
    ("DeepseekV32Attention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # deepseek_v32/modeling_deepseek_v32.py:368
    ("DeepseekV32Attention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # deepseek_v32/modeling_deepseek_v32.py:546
    ("DeepseekV32Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # deepseek_v4/modeling_deepseek_v4.py:1047
    ("DeepseekV4Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # dia/modeling_dia.py:106
    ("DiaMLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # diffusion_gemma/modeling_diffusion_gemma.py:552
    ("DiffusionGemmaTextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # dots1/modeling_dots1.py:321
    ("Dots1Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # dots3_note/modeling_dots3_note.py:1012
    ("Dots3NoteAudioMLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # dots3_note/modeling_dots3_note.py:344
    ("Dots3NoteExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # dots3_note/modeling_dots3_note.py:477
    ("Dots3NoteTextAttention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # dots3_note/modeling_dots3_note.py:483
    ("Dots3NoteTextAttention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # dots3_note/modeling_dots3_note.py:1352
    ("Dots3NoteVisionAttention", "qkv"): (
        False,
        lambda m: [m.num_heads * m.head_dim, m.num_heads * m.head_dim, m.num_heads * m.head_dim],
    ),
    # ernie4_5_moe/modeling_ernie4_5_moe.py:304
    ("Ernie4_5_MoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # ernie4_5_vl_moe/modeling_ernie4_5_vl_moe.py:360
    ("Ernie4_5_VLMoeMoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # ernie4_5_vl_moe/modeling_ernie4_5_vl_moe.py:558
    ("Ernie4_5_VLMoeVisionAttention", "qkv"): (False, lambda m: [m.dim, m.dim, m.dim]),
    # esm/modeling_esmfold.py:1394
    ("EsmFoldInvariantPointAttention", "linear_kv"): (True, lambda m: [m.hidden_dim] * 2),
    # esm/modeling_esmfold.py:1400
    ("EsmFoldInvariantPointAttention", "linear_kv_points"): (True, lambda m: [m.num_qk_points, m.num_v_points]),
    # esm/modeling_esmfold.py:951
    ("EsmFoldSelfAttention", "proj"): (True, lambda m: [m.head_width] * 3),
    # esm/modeling_esmfold.py:1031
    ("EsmFoldSequenceToPair", "proj"): (False, lambda m: [m.proj.out_features // 2] * 2),
    # esmfold2/modeling_esmfold2.py:349
    ("EsmFold2AtomLayer", "adaln_linear"): (False, lambda m: [m.adaln_linear.out_features // 6] * 6),
    # esmfold2/modeling_esmfold2.py:1152
    ("EsmFold2OuterProductMean", "input_proj"): (False, lambda m: [m.outer_hidden_size] * 2),
    # esmfold2/modeling_esmfold2.py:198
    ("EsmFold2SwiGLU", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # esmfold2/modeling_esmfold2.py:1069
    ("EsmFold2TriangleMultiplicativeUpdate", "proj_bundle"): (False, lambda m: [m.dim] * 4),
    # evolla/modeling_evolla.py:626
    ("EvollaSequenceCompressorAttention", "to_kv"): (False, lambda m: [m.to_kv.out_features // 2] * 2),
    # exaone4_5/modeling_exaone4_5.py:245
    ("Exaone4_5_VisionAttention", "qkv"): (False, lambda m: [m.q_dim, m.kv_dim, m.kv_dim]),
    # exaone_moe/modeling_exaone_moe.py:276
    ("ExaoneMoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # falcon_h1/modeling_falcon_h1.py:626
    ("FalconH1Mixer", "in_proj"): (
        False,
        lambda m: [
            m.intermediate_size,
            m.intermediate_size,
            m.n_groups * m.ssm_state_size,
            m.n_groups * m.ssm_state_size,
            m.num_heads,
        ],
    ),
    # falcon_mamba/modeling_falcon_mamba.py:333
    ("FalconMambaMixer", "in_proj"): (False, lambda m: [m.intermediate_size] * 2),
    # falcon_mamba/modeling_falcon_mamba.py:335
    ("FalconMambaMixer", "x_proj"): (False, lambda m: [m.time_step_rank, m.ssm_state_size, m.ssm_state_size]),
    # fastspeech2_conformer/modeling_fastspeech2_conformer.py:484
    ("FastSpeech2ConformerConvolutionModule", "pointwise_conv1"): (
        False,
        lambda m: [m.pointwise_conv1.out_channels // 2] * 2,
    ),
    # flex_olmo/modeling_flex_olmo.py:303
    ("FlexOlmoExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # flint/modeling_flint.py:113
    ("FlintExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # florence2/modeling_florence2.py:229
    ("Florence2VisionChannelAttention", "qkv"): (False, lambda m: [m.dim, m.dim, m.dim]),
    # florence2/modeling_florence2.py:334
    ("Florence2VisionWindowAttention", "qkv"): (False, lambda m: [m.dim, m.dim, m.dim]),
    # focalnet/modeling_focalnet.py:256
    ("FocalNetModulation", "projection_in"): (False, lambda m: [m.dim, m.dim, m.focal_level + 1]),
    # gemma3n/modeling_gemma3n.py:853
    ("Gemma3nAudioConformerLightConv1d", "linear_start"): (False, lambda m: [m.linear_start.out_features // 2] * 2),
    # gemma4/modeling_gemma4.py:494
    ("Gemma4AudioLightConv1d", "linear_start.linear"): (False, lambda m: [m.linear_start.linear.out_features // 2] * 2),
    # gemma4/modeling_gemma4.py:1271
    ("Gemma4TextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # glm/modeling_glm.py:52
    ("GlmMLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # glm4/modeling_glm4.py:53
    ("Glm4MLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # glm4_moe/modeling_glm4_moe.py:339
    ("Glm4MoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # glm4_moe_lite/modeling_glm4_moe_lite.py:260
    ("Glm4MoeLiteAttention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # glm4_moe_lite/modeling_glm4_moe_lite.py:266
    ("Glm4MoeLiteAttention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # glm4_moe_lite/modeling_glm4_moe_lite.py:445
    ("Glm4MoeLiteExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # glm4v/modeling_glm4v.py:607
    ("Glm4vTextMLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # glm4v/modeling_glm4v.py:322
    ("Glm4vVisionAttention", "qkv"): (
        False,
        lambda m: [m.num_heads * m.head_dim, m.num_heads * m.head_dim, m.num_heads * m.head_dim],
    ),
    # glm4v_moe/modeling_glm4v_moe.py:320
    ("Glm4vMoeTextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # glm4v_moe/modeling_glm4v_moe.py:716
    ("Glm4vMoeVisionAttention", "qkv"): (
        False,
        lambda m: [m.num_heads * m.head_dim, m.num_heads * m.head_dim, m.num_heads * m.head_dim],
    ),
    # glm5_next/modeling_glm5_next.py:1131
    ("Glm5NextTextAttention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # glm5_next/modeling_glm5_next.py:1137
    ("Glm5NextTextAttention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # glm5_next/modeling_glm5_next.py:115
    ("Glm5NextTextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # glm5_next/modeling_glm5_next.py:1615
    ("Glm5NextVisionAttention", "qkv"): (
        False,
        lambda m: [m.num_heads * m.head_dim, m.num_heads * m.head_dim, m.num_heads * m.head_dim],
    ),
    # glm_image/modeling_glm_image.py:694
    ("GlmImageTextMLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # glm_image/modeling_glm_image.py:171
    ("GlmImageVisionAttention", "qkv"): (
        False,
        lambda m: [m.num_heads * m.head_dim, m.num_heads * m.head_dim, m.num_heads * m.head_dim],
    ),
    # glm_moe_dsa/modeling_glm_moe_dsa.py:327
    ("GlmMoeDsaAttention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # glm_moe_dsa/modeling_glm_moe_dsa.py:333
    ("GlmMoeDsaAttention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # glm_moe_dsa/modeling_glm_moe_dsa.py:519
    ("GlmMoeDsaExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # glm_ocr/modeling_glm_ocr.py:241
    ("GlmOcrTextMLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # glm_ocr/modeling_glm_ocr.py:348
    ("GlmOcrVisionAttention", "qkv"): (
        False,
        lambda m: [m.num_heads * m.head_dim, m.num_heads * m.head_dim, m.num_heads * m.head_dim],
    ),
    # got_ocr2/modeling_got_ocr2.py:90
    ("GotOcr2VisionAttention", "qkv"): (
        False,
        lambda m: [m.qkv.out_features // 3, m.qkv.out_features // 3, m.qkv.out_features // 3],
    ),
    # gpt2/modeling_gpt2.py:103
    ("GPT2Attention", "c_attn"): (False, lambda m: [m.split_size] * (2 if m.is_cross_attention else 3)),
    # gpt_neox/modeling_gpt_neox.py:181
    ("GPTNeoXAttention", "query_key_value"): (True, lambda m: [m.head_size] * 3),
    # gpt_neox_japanese/modeling_gpt_neox_japanese.py:155
    ("GPTNeoXJapaneseAttention", "query_key_value"): (True, lambda m: [m.head_size] * 3),
    # gpt_oss/modeling_gpt_oss.py:74
    ("GptOssExperts", "gate_up_proj"): (True, lambda m: [1, 1]),
    # gradium_phonon_tts/modeling_gradium_phonon_tts.py:627
    ("GradiumPhononTTSFlowResBlock", "adaln_proj"): (
        False,
        lambda m: [m.adaln_proj.out_features // m.num_chunks] * m.num_chunks,
    ),
    # granite_speech/modeling_granite_speech.py:161
    ("GraniteSpeechConformerAttention", "to_kv"): (False, lambda m: [m.num_heads * m.dim_head] * 2),
    # granite_speech/modeling_granite_speech.py:237
    ("GraniteSpeechConformerConvModule", "up_conv"): (False, lambda m: [m.up_conv.out_channels // 2] * 2),
    # granite_speech5/modeling_granite_speech5.py:179
    ("GraniteSpeech5EncoderConvolutionModule", "pointwise_lin1"): (
        False,
        lambda m: [m.pointwise_lin1.out_features // 2] * 2,
    ),
    # granite_speech_plus/modeling_granite_speech_plus.py:308
    ("GraniteSpeechPlusConformerAttention", "to_kv"): (False, lambda m: [m.num_heads * m.dim_head] * 2),
    # granite_speech_plus/modeling_granite_speech_plus.py:384
    ("GraniteSpeechPlusConformerConvModule", "up_conv"): (False, lambda m: [m.up_conv.out_channels // 2] * 2),
    # granitemoe/modeling_granitemoe.py:144
    ("GraniteMoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # granitemoe_swa/modeling_granitemoe_swa.py:77
    ("GraniteMoeSWAExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # granitemoe_swa/modeling_granitemoe_swa.py:317
    ("GraniteMoeSWAMLP", "input_linear"): (False, lambda m: [m.hidden_size] * 2),
    # granitemoehybrid/modeling_granitemoehybrid.py:848
    ("GraniteMoeHybridExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # granitemoehybrid/modeling_granitemoehybrid.py:759
    ("GraniteMoeHybridMLP", "input_linear"): (False, lambda m: [m.hidden_size] * 2),
    # granitemoehybrid/modeling_granitemoehybrid.py:544
    ("GraniteMoeHybridMambaLayer", "in_proj"): (
        False,
        lambda m: [
            m.intermediate_size,
            m.intermediate_size,
            m.n_groups * m.ssm_state_size,
            m.n_groups * m.ssm_state_size,
            m.num_heads,
        ],
    ),
    # granitemoeshared/modeling_granitemoeshared.py:147
    ("GraniteMoeSharedExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # granitemoeshared/modeling_granitemoeshared.py:84
    ("GraniteMoeSharedMLP", "input_linear"): (False, lambda m: [m.hidden_size] * 2),
    # hiera/modeling_hiera.py:337
    ("HieraMaskUnitAttention", "qkv"): (
        False,
        lambda m: [m.hidden_size_output, m.hidden_size_output, m.hidden_size_output],
    ),
    # hunyuan_v1_moe/modeling_hunyuan_v1_moe.py:252
    ("HunYuanMoEV1Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # hy_v3/modeling_hy_v3.py:308
    ("HYV3Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # hy_v4/modeling_hy_v4.py:349
    ("HYV4Attention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # hy_v4/modeling_hy_v4.py:355
    ("HYV4Attention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # hy_v4/modeling_hy_v4.py:549
    ("HYV4Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # imagegpt/modeling_imagegpt.py:92
    ("ImageGPTAttention", "c_attn"): (False, lambda m: [m.split_size] * (2 if m.is_cross_attention else 3)),
    # inkling/modeling_inkling.py:313
    ("InklingExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # inkling2/modeling_inkling2.py:665
    ("Inkling2Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # instructblip/modeling_instructblip.py:219
    ("InstructBlipAttention", "qkv"): (False, lambda m: [m.embed_dim, m.embed_dim, m.embed_dim]),
    # instructblipvideo/modeling_instructblipvideo.py:260
    ("InstructBlipVideoAttention", "qkv"): (False, lambda m: [m.embed_dim, m.embed_dim, m.embed_dim]),
    # jamba/modeling_jamba.py:649
    ("JambaExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # jamba/modeling_jamba.py:482
    ("JambaMambaMixer", "in_proj"): (False, lambda m: [m.intermediate_size] * 2),
    # jamba/modeling_jamba.py:484
    ("JambaMambaMixer", "x_proj"): (False, lambda m: [m.time_step_rank, m.ssm_state_size, m.ssm_state_size]),
    # jetmoe/modeling_jetmoe.py:449
    ("JetMoeAttention", "kv_proj"): (False, lambda m: [m.kv_projection_size] * 2),
    # jetmoe/modeling_jetmoe.py:225
    ("JetMoeMoE", "input_linear.weight"): (False, lambda m: [m.hidden_size] * 2),
    # kimi_linear/modeling_kimi_linear.py:229
    ("KimiLinearAttention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # kimi_linear/modeling_kimi_linear.py:235
    ("KimiLinearAttention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # kimi_linear/modeling_kimi_linear.py:106
    ("KimiLinearExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # kolibri1/modeling_kolibri1.py:234
    ("Kolibri1Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # kyutai_speech_to_text/modeling_kyutai_speech_to_text.py:180
    ("KyutaiSpeechToTextGatingMLP", "fc1"): (False, lambda m: [m.fc1.out_features // 2] * 2),
    # laguna/modeling_laguna.py:187
    ("LagunaExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # lasr/modeling_lasr.py:270
    ("LasrEncoderConvolutionModule", "pointwise_conv1"): (False, lambda m: [m.pointwise_conv1.out_channels // 2] * 2),
    # layoutlmv2/modeling_layoutlmv2.py:115
    ("LayoutLMv2SelfAttention", "qkv_linear"): (False, lambda m: [m.all_head_size, m.all_head_size, m.all_head_size]),
    # levit/modeling_levit.py:161
    ("LevitAttention", "queries_keys_values.linear"): (
        True,
        lambda m: [m.key_dim, m.key_dim, m.attention_ratio * m.key_dim],
    ),
    # levit/modeling_levit.py:234
    ("LevitAttentionSubsample", "keys_values.linear"): (True, lambda m: [m.key_dim, m.attention_ratio * m.key_dim]),
    # lfm2/modeling_lfm2.py:336
    ("Lfm2ShortConv", "in_proj"): (False, lambda m: [m.in_proj.out_features // 3] * 3),
    # lfm2_moe/modeling_lfm2_moe.py:140
    ("Lfm2MoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # lfm2_moe/modeling_lfm2_moe.py:421
    ("Lfm2MoeShortConv", "in_proj"): (False, lambda m: [m.in_proj.out_features // 3] * 3),
    # lfm3/modeling_lfm3.py:361
    ("Lfm3ShortConv", "in_proj"): (False, lambda m: [m.in_proj.out_features // 3] * 3),
    # lfm3_vl/modeling_lfm3_vl.py:299
    ("Lfm3VlVisionShortConv", "in_proj"): (False, lambda m: [m.in_proj.out_features // 3] * 3),
    # llama4/modeling_llama4.py:61
    ("Llama4TextExperts", "gate_up_proj"): (False, lambda m: [m.expert_dim] * 2),
    # longcat_flash/modeling_longcat_flash.py:170
    ("LongcatFlashExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_size] * 2),
    # longcat_flash/modeling_longcat_flash.py:344
    ("LongcatFlashMLA", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # longcat_flash/modeling_longcat_flash.py:350
    ("LongcatFlashMLA", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # mamba/modeling_mamba.py:318
    ("MambaMixer", "in_proj"): (False, lambda m: [m.intermediate_size] * 2),
    # mamba/modeling_mamba.py:320
    ("MambaMixer", "x_proj"): (False, lambda m: [m.time_step_rank, m.ssm_state_size, m.ssm_state_size]),
    # mamba2/modeling_mamba2.py:417
    ("Mamba2Mixer", "in_proj"): (
        False,
        lambda m: [
            m.intermediate_size,
            m.intermediate_size,
            m.n_groups * m.ssm_state_size,
            m.n_groups * m.ssm_state_size,
            m.num_heads,
        ],
    ),
    # mellum/modeling_mellum.py:281
    ("MellumExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # mgp_str/modeling_mgp_str.py:132
    ("MgpstrAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # mimo_v2_flash/modeling_mimo_v2_flash.py:179
    ("MiMoV2FlashExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # minicpm3/modeling_minicpm3.py:270
    ("MiniCPM3Attention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # minicpm3/modeling_minicpm3.py:276
    ("MiniCPM3Attention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # minimax/modeling_minimax.py:478
    ("MiniMaxExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # minimax/modeling_minimax.py:136
    ("MiniMaxLightningAttention", "qkv_proj"): (True, lambda m: [m.head_dim] * 3),
    # minimax_m2/modeling_minimax_m2.py:75
    ("MiniMaxM2Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # minimax_m3_vl/modeling_minimax_m3_vl.py:168
    ("MiniMaxM3VLDenseMLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # minimax_m3_vl/modeling_minimax_m3_vl.py:189
    ("MiniMaxM3VLExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # mistral4/modeling_mistral4.py:401
    ("Mistral4Attention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # mistral4/modeling_mistral4.py:407
    ("Mistral4Attention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # mistral4/modeling_mistral4.py:179
    ("Mistral4Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # mistral_large4/modeling_mistral_large4.py:350
    ("MistralLarge4TextAttention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # mistral_large4/modeling_mistral_large4.py:358
    ("MistralLarge4TextAttention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # mistral_large4/modeling_mistral_large4.py:560
    ("MistralLarge4TextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # mixtral/modeling_mixtral.py:64
    ("MixtralExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # modernbert/modeling_modernbert.py:235
    ("ModernBertAttention", "Wqkv"): (False, lambda m: [m.Wqkv.out_features // 3] * 3),
    # modernbert/modeling_modernbert.py:83
    ("ModernBertMLP", "Wi"): (False, lambda m: [m.Wi.out_features // 2] * 2),
    # modernbert_decoder/modeling_modernbert_decoder.py:80
    ("ModernBertDecoderMLP", "Wi"): (False, lambda m: [m.Wi.out_features // 2] * 2),
    # moonshine/modeling_moonshine.py:88
    ("MoonshineDecoderMLP", "fc1"): (False, lambda m: [m.fc1.out_features // 2] * 2),
    # moonshine_streaming/modeling_moonshine_streaming.py:455
    ("MoonshineStreamingDecoderMLP", "fc1"): (False, lambda m: [m.fc1.out_features // 2] * 2),
    # moshi/modeling_moshi.py:356
    ("MoshiGatingMLP", "fc1"): (False, lambda m: [m.fc1.out_features // 2] * 2),
    # mpt/modeling_mpt.py:82
    ("MptAttention", "Wqkv"): (False, lambda m: [m.hidden_size] * 3),
    # muse_spark/modeling_muse_spark.py:218
    ("MuseSparkExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # nemotron_asr_streaming/modeling_nemotron_asr_streaming.py:400
    ("NemotronAsrStreamingEncoderConvolutionModule", "pointwise_conv1"): (
        False,
        lambda m: [m.pointwise_conv1.out_channels // 2] * 2,
    ),
    # nemotron_h/modeling_nemotron_h.py:428
    ("NemotronHMamba2Mixer", "in_proj"): (
        False,
        lambda m: [
            m.intermediate_size,
            m.intermediate_size,
            m.n_groups * m.ssm_state_size,
            m.n_groups * m.ssm_state_size,
            m.num_heads,
        ],
    ),
    # olmoe/modeling_olmoe.py:286
    ("OlmoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # openai_privacy_filter/modeling_openai_privacy_filter.py:250
    ("OpenAIPrivacyFilterExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_size] * 2),
    # parakeet/modeling_parakeet.py:130
    ("ParakeetEncoderConvolutionModule", "pointwise_conv1"): (
        False,
        lambda m: [m.pointwise_conv1.out_channels // 2] * 2,
    ),
    # persimmon/modeling_persimmon.py:202
    ("PersimmonAttention", "query_key_value"): (True, lambda m: [m.head_dim] * 3),
    # phi3/modeling_phi3.py:205
    ("Phi3Attention", "qkv_proj"): (
        False,
        lambda m: [
            m.config.num_attention_heads * m.head_dim,
            m.num_key_value_heads * m.head_dim,
            m.num_key_value_heads * m.head_dim,
        ],
    ),
    # phi3/modeling_phi3.py:53
    ("Phi3MLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # phi4_multimodal/modeling_phi4_multimodal.py:1234
    ("Phi4MultimodalAttention", "qkv_proj"): (
        False,
        lambda m: [
            m.config.num_attention_heads * m.head_dim,
            m.num_key_value_heads * m.head_dim,
            m.num_key_value_heads * m.head_dim,
        ],
    ),
    # phi4_multimodal/modeling_phi4_multimodal.py:684
    ("Phi4MultimodalAudioGluPointWiseConv", "ext_pw_conv_1d"): (False, lambda m: [m.output_dim] * 2),
    # phi4_multimodal/modeling_phi4_multimodal.py:596
    ("Phi4MultimodalAudioMLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # phi4_multimodal/modeling_phi4_multimodal.py:1131
    ("Phi4MultimodalMLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # phimoe/modeling_phimoe.py:308
    ("PhimoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # pocket_tts/modeling_pocket_tts.py:327
    ("PocketTTSFlowResBlock", "adaln_proj"): (
        False,
        lambda m: [m.adaln_proj.out_features // m.num_chunks] * m.num_chunks,
    ),
    # pp_doclayout_v2/modeling_pp_doclayout_v2.py:58
    ("PPDocLayoutV2GlobalPointer", "dense"): (False, lambda m: [m.head_size] * 2),
    # pp_doclayout_v3/modeling_pp_doclayout_v3.py:56
    ("PPDocLayoutV3GlobalPointer", "dense"): (False, lambda m: [m.head_size] * 2),
    # pp_formulanet/modeling_pp_formulanet.py:109
    ("PPFormulaNetVisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # pp_ocrv5_mobile_rec/modeling_pp_ocrv5_mobile_rec.py:60
    ("PPOCRV5MobileRecAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # pp_ocrv5_server_rec/modeling_pp_ocrv5_server_rec.py:120
    ("PPOCRV5ServerRecAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # pp_ocrv6_small_rec/modeling_pp_ocrv6_small_rec.py:89
    ("PPOCRV6SmallRecAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # qwen2_5_omni/modeling_qwen2_5_omni.py:2889
    ("Qwen2_5_OmniAdaLayerNormZero", "linear"): (False, lambda m: [m.linear.out_features // 6] * 6),
    # qwen2_5_omni/modeling_qwen2_5_omni.py:2908
    ("Qwen2_5_OmniAdaLayerNormZero_Final", "linear"): (False, lambda m: [m.linear.out_features // 2] * 2),
    # qwen2_5_vl/modeling_qwen2_5_vl.py:261
    ("Qwen2_5_VLVisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # qwen2_moe/modeling_qwen2_moe.py:279
    ("Qwen2MoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # qwen2_vl/modeling_qwen2_vl.py:351
    ("VisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # qwen3_5/modeling_qwen3_5.py:754
    ("Qwen3_5Attention", "q_proj"): (True, lambda m: [m.head_dim, m.head_dim]),
    # qwen3_5/modeling_qwen3_5.py:539
    ("Qwen3_5GatedDeltaNet", "in_proj_qkv"): (False, lambda m: [m.key_dim, m.key_dim, m.value_dim]),
    # qwen3_5/modeling_qwen3_5.py:1011
    ("Qwen3_5VisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # qwen3_5_moe/modeling_qwen3_5_moe.py:750
    ("Qwen3_5MoeAttention", "q_proj"): (True, lambda m: [m.head_dim, m.head_dim]),
    # qwen3_5_moe/modeling_qwen3_5_moe.py:840
    ("Qwen3_5MoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # qwen3_5_moe/modeling_qwen3_5_moe.py:535
    ("Qwen3_5MoeGatedDeltaNet", "in_proj_qkv"): (False, lambda m: [m.key_dim, m.key_dim, m.value_dim]),
    # qwen3_5_moe/modeling_qwen3_5_moe.py:1100
    ("Qwen3_5MoeVisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # qwen3_moe/modeling_qwen3_moe.py:217
    ("Qwen3MoeExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # qwen3_next/modeling_qwen3_next.py:241
    ("Qwen3NextAttention", "q_proj"): (True, lambda m: [m.head_dim, m.head_dim]),
    # qwen3_next/modeling_qwen3_next.py:797
    ("Qwen3NextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # qwen3_next/modeling_qwen3_next.py:613
    ("Qwen3NextGatedDeltaNet", "in_proj_ba"): (
        True,
        lambda m: [m.num_v_heads // m.num_k_heads, m.num_v_heads // m.num_k_heads],
    ),
    # qwen3_next/modeling_qwen3_next.py:612
    ("Qwen3NextGatedDeltaNet", "in_proj_qkvz"): (
        True,
        lambda m: [
            m.head_k_dim,
            m.head_k_dim,
            m.num_v_heads // m.num_k_heads * m.head_v_dim,
            m.num_v_heads // m.num_k_heads * m.head_v_dim,
        ],
    ),
    # qwen3_omni_moe/modeling_qwen3_omni_moe.py:2850
    ("Qwen3OmniMoeTalkerTextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # qwen3_omni_moe/modeling_qwen3_omni_moe.py:1315
    ("Qwen3OmniMoeThinkerTextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # qwen3_omni_moe/modeling_qwen3_omni_moe.py:887
    ("Qwen3OmniMoeVisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # qwen3_vl/modeling_qwen3_vl.py:247
    ("Qwen3VLVisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # qwen3_vl_moe/modeling_qwen3_vl_moe.py:93
    ("Qwen3VLMoeTextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # qwen3_vl_moe/modeling_qwen3_vl_moe.py:481
    ("Qwen3VLMoeVisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # qwen4_exp/modeling_qwen4_exp.py:824
    ("Qwen4ExpTextAttention", "q_proj"): (True, lambda m: [m.head_dim, m.head_dim]),
    # qwen4_exp/modeling_qwen4_exp.py:923
    ("Qwen4ExpTextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # qwen4_exp/modeling_qwen4_exp.py:505
    ("Qwen4ExpTextGatedDeltaNet", "in_proj_qkv"): (False, lambda m: [m.key_dim, m.key_dim, m.value_dim]),
    # qwen4_exp/modeling_qwen4_exp.py:682
    ("Qwen4ExpTextQSAIndexer", "index_qk_proj"): (
        False,
        lambda m: [m.index_n_heads * m.index_head_dim, m.index_kv_heads * m.index_head_dim],
    ),
    # qwen4_exp/modeling_qwen4_exp.py:1808
    ("Qwen4ExpVisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # sam/modeling_sam.py:717
    ("SamVisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # sam/modeling_sam.py:717
    ("SamVisionSdpaAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # sam2/modeling_sam2.py:321
    ("Sam2MultiScaleAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # sam_hq/modeling_sam_hq.py:141
    ("SamHQVisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # sam_hq/modeling_sam_hq.py:141
    ("SamHQVisionSdpaAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # seamless_m4t/modeling_seamless_m4t.py:768
    ("SeamlessM4TConformerAdapterLayer", "residual_conv"): (False, lambda m: [m.residual_conv.out_channels // 2] * 2),
    # seamless_m4t/modeling_seamless_m4t.py:779
    ("SeamlessM4TConformerAdapterLayer", "self_attn_conv"): (False, lambda m: [m.self_attn_conv.out_channels // 2] * 2),
    # seamless_m4t/modeling_seamless_m4t.py:421
    ("SeamlessM4TConformerConvolutionModule", "pointwise_conv1"): (
        False,
        lambda m: [m.pointwise_conv1.out_channels // 2] * 2,
    ),
    # seamless_m4t_v2/modeling_seamless_m4t_v2.py:649
    ("SeamlessM4Tv2ConformerAdapterLayer", "residual_conv"): (False, lambda m: [m.residual_conv.out_channels // 2] * 2),
    # seamless_m4t_v2/modeling_seamless_m4t_v2.py:660
    ("SeamlessM4Tv2ConformerAdapterLayer", "self_attn_conv"): (
        False,
        lambda m: [m.self_attn_conv.out_channels // 2] * 2,
    ),
    # seamless_m4t_v2/modeling_seamless_m4t_v2.py:334
    ("SeamlessM4Tv2ConformerConvolutionModule", "pointwise_conv1"): (
        False,
        lambda m: [m.pointwise_conv1.out_channels // 2] * 2,
    ),
    # seggpt/modeling_seggpt.py:224
    ("SegGptAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # slanext/modeling_slanext.py:59
    ("SLANeXtVisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # solar_open/modeling_solar_open.py:151
    ("SolarOpenExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # step3p7/modeling_step3p7.py:553
    ("Step3p7Experts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # timesformer/modeling_timesformer.py:159
    ("TimesformerSelfAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # unlimited_ocr/modeling_unlimited_ocr.py:163
    ("UnlimitedOcrSamVisionAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # unlimited_ocr/modeling_unlimited_ocr.py:163
    ("UnlimitedOcrSamVisionSdpaAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # unlimited_ocr/modeling_unlimited_ocr.py:1116
    ("UnlimitedOcrTextExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
    # vibevoice/modeling_vibevoice.py:144
    ("VibeVoiceDiffusionHeadAdaLayerNorm", "linear"): (
        False,
        lambda m: [m.linear.out_features // m.num_chunks] * m.num_chunks,
    ),
    # vibevoice/modeling_vibevoice.py:158
    ("VibeVoiceDiffusionHeadFinalLayer", "linear_1"): (
        False,
        lambda m: [m.linear_1.out_features // m.num_chunks] * m.num_chunks,
    ),
    # vitdet/modeling_vitdet.py:222
    ("VitDetAttention", "qkv"): (False, lambda m: [m.qkv.out_features // 3] * 3),
    # wav2vec2/modeling_wav2vec2.py:860
    ("Wav2Vec2AdapterLayer", "conv"): (False, lambda m: [m.conv.out_channels // 2] * 2),
    # wav2vec2_bert/modeling_wav2vec2_bert.py:649
    ("Wav2Vec2BertAdapterLayer", "residual_conv"): (False, lambda m: [m.residual_conv.out_channels // 2] * 2),
    # wav2vec2_bert/modeling_wav2vec2_bert.py:660
    ("Wav2Vec2BertAdapterLayer", "self_attn_conv"): (False, lambda m: [m.self_attn_conv.out_channels // 2] * 2),
    # wav2vec2_bert/modeling_wav2vec2_bert.py:171
    ("Wav2Vec2BertConvolutionModule", "pointwise_conv1"): (False, lambda m: [m.pointwise_conv1.out_channels // 2] * 2),
    # wav2vec2_conformer/modeling_wav2vec2_conformer.py:839
    ("Wav2Vec2ConformerAdapterLayer", "conv"): (False, lambda m: [m.conv.out_channels // 2] * 2),
    # wav2vec2_conformer/modeling_wav2vec2_conformer.py:375
    ("Wav2Vec2ConformerConvolutionModule", "pointwise_conv1"): (
        False,
        lambda m: [m.pointwise_conv1.out_channels // 2] * 2,
    ),
    # wavlm/modeling_wavlm.py:783
    ("WavLMAdapterLayer", "conv"): (False, lambda m: [m.conv.out_channels // 2] * 2),
    # xlstm/modeling_xlstm.py:1011
    ("xLSTMFeedForward", "proj_up_gate_z"): (False, lambda m: [m.up_proj_dim] * 2),
    # xlstm/modeling_xlstm.py:1082
    ("xLSTMLayer", "ifgate_preact"): (False, lambda m: [m.config.num_heads] * 2),
    # xlstm/modeling_xlstm.py:1077
    ("xLSTMLayer", "qkv_opreact"): (False, lambda m: [m.qk_dim, m.qk_dim, m.v_dim, m.v_dim]),
    # youtu/modeling_youtu.py:297
    ("YoutuAttention", "kv_a_proj_with_mqa"): (False, lambda m: [m.kv_lora_rank, m.qk_rope_head_dim]),
    # youtu/modeling_youtu.py:303
    ("YoutuAttention", "kv_b_proj"): (True, lambda m: [m.qk_nope_head_dim, m.v_head_dim]),
    # zamba/modeling_zamba.py:447
    ("ZambaMambaMixer", "in_proj"): (True, lambda m: [1, 1]),
    # zamba/modeling_zamba.py:450
    ("ZambaMambaMixer", "x_proj_weight"): (False, lambda m: [m.time_step_rank, m.ssm_state_size, m.ssm_state_size]),
    # zamba2/modeling_zamba2.py:882
    ("Zamba2MLP", "gate_up_proj"): (False, lambda m: [m.gate_up_proj.out_features // 2] * 2),
    # zamba2/modeling_zamba2.py:684
    ("Zamba2MambaMixer", "in_proj"): (
        False,
        lambda m: [
            m.intermediate_size,
            m.intermediate_size,
            m.n_groups * m.ssm_state_size,
            m.n_groups * m.ssm_state_size,
            m.num_heads,
        ],
    ),
    # zaya/modeling_zaya.py:185
    ("ZayaCCAProjection", "conv_qk_grouped"): (
        False,
        lambda m: [m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim],
    ),
    # zaya/modeling_zaya.py:578
    ("ZayaExperts", "gate_up_proj"): (False, lambda m: [m.intermediate_dim] * 2),
}
