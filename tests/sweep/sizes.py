"""What an option of a config is set to, by its name: rules first, then what no rule can know."""

from __future__ import annotations

import re
from typing import Any

WIDTH, HEADS, HEAD_WIDTH, BLOCKS, VOCABULARY, POSITIONS = 64, 4, 16, 5, 96, 128
PAD, BOS, EOS, LABELS = 0, 1, 2, 3

# (names, value): the first rule whose pattern is the whole name counts; an option that is None keeps it.
RULES: list[tuple[str, Any]] = [
    (r"(n|num|moe_num)_shared_experts", 1),
    (r".*experts_per_tok|moe_(k|topk|top_k)|top_k_experts|num_experts_per_token", 2),
    (r".*num_experts|n_routed_experts|num_local_experts|n_experts", 4),
    (r"n_group|topk_group|n_groups|mamba_n_?groups|num_expert_group", 1),
    (r"head_dim|.*_head_dim|d_kv|d_head|attention_head_size|dim_head|.*_dim_head", HEAD_WIDTH),
    (r"kv_channels|.*_head_width|mamba_d_head|qk_nope_head_dim|linear_.*_head_dim", HEAD_WIDTH),
    (r"index_n_heads|.*kv_heads|.*key_value_heads|kv_n_heads|linear_num_.*_heads", 2),
    (r"n_mamba_heads", 2),
    (r".*(n|num|attention|mamba|resampler)_heads?|attention_heads|resampler_heads", HEADS),
    (r"num_(cross|self)_attention_heads", HEADS),
    (r".*lora_rank|.*_lowrank|laurel_rank|gated_norm_rank|adapter_rank", 16),
    (r".*hidden_size_per_layer_input", 16),
    (r"(.*_)?(vocab_size|vocab_size_.*)|char_vocab_size|mel_vocab_size", VOCABULARY),
    (
        r"(.*_)?(intermediate_size|intermediate_dim|ffn_dim|d_ff|dff|dim_ff|d_inner|n_inner)",
        2 * WIDTH,
    ),
    (r".*ffn_hidden_size|feed_forward_size|inner_dim|mlp_dim|intermediate_size_mlp", 2 * WIDTH),
    (r"attention_hidden_size|mamba_d_ssm", WIDTH),
    (r"(.*_)?hidden_(size|dim)(_global)?|d_model|n_embd|dim|width|embedding_dim", WIDTH),
    (r".*(embed|emb|embedding|projection|proj)_(dim|size)|d_embed|output_dim|d_latents", WIDTH),
    (r"projector_(input|output)_dim|vision_output_dim|lru_width|.*_proj_dims?", WIDTH),
    (r"backbone_hidden_size|hidden_size_global|share_expert_dim|prediction_head_size", WIDTH),
    (r"pronunciation_embed_dim|shape_embed_dim|pooler_output_size|prompt_mid_dim", WIDTH),
    (r"(.*_)?(num_hidden|encoder|decoder)_layers|n_layers?|num_layers|layers|depth", BLOCKS),
    (r"(num_)?(encoder|decoder)_layers|num_blocks|[lxr]_layers|resampler_depth", BLOCKS),
    (r"num_sparse_(encoder|decoder)_layers", 2),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"max_.*position.*|n_positions|max_(source|target)_positions|n_ctx|context_length", POSITIONS),
    (r"model_max_length|max_seq_len|seq_length|seq_len|max_(sequence|context)_length", POSITIONS),
    (r"image_size|input_size|resolution", 28),
    (r"patch_size", 14),
    (r"sliding_window(_size)?|attention_chunk_size|local_attention|attention_window_size", 4),
    (r"num_position_embeddings|num_patches|mm_tokens_per_image|image_seq_length", 4),
    (r"vision_soft_tokens_per_image|latent_query_num|num_query_tokens", 4),
    (r".*state_size|mamba_d_state|ssm_state_size", 8),
    (r"expand|mamba_expand", 1),
    (r".*chunk_size", 16),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"index_topk", 4),
    (r"attention_window", 4),
    (r"decoder_start_token_id", PAD + 1),
    (r"coordinate_size", 11),
    (r"shape_size", 10),
    (r"rotary_dim", 8),
    (r"(encoder_|decoder_)?layerdrop", 0.0),
    (r"initializer_range|init_std|initializer_factor", 0.2),
]
# Set even where the default is None.
ALWAYS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
# By model type, also of a part: what no rule on names can know.
SHARING = ["sliding_attention", "full_attention", "sliding_attention"]
SHARING += [
    "sliding_attention",
    "full_attention",
]  # every kind has a block before the ones that share
HYBRID = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]
MIXED = [
    "linear_attention",
    "full_attention",
    "linear_attention",
    "linear_attention",
    "full_attention",
]
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
SAM = {
    "output_channels": 16,
    "downsample_channels": [32, 64],
    "global_attn_indexes": [2],
    "window_size": 2,
}
ODD: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "bamba": {"attn_layer_indices": [1, 4]},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": VOCABULARY},
    "canine": {"num_hash_buckets": 64},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": SECTIONS, "sliding_attention": SECTIONS},
        "layer_types": SHARING,
    },
    "cosmos3_edge_text": {"rope_parameters": SECTIONS},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 4, "num_experts_per_tok": 2},
    "deepseek_ocr2_sam_vision_model": SAM,
    "unlimited_ocr_sam_vision_model": SAM,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_vision_encoder": {
        "pyramid_num_routed": [-1, 4, -1, 4, 4],
        "adapter_in_dim": WIDTH,
        "adapter_out_dim": WIDTH,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "dots3_note_text": {
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
        "swa_kv_lora_rank": 16,
        "swa_q_lora_rank": 16,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 89}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "encoder-decoder": {"decoder_start_token_id": BOS},
    "ernie4_5_vl_moe_text": {"rope_parameters": SECTIONS, "moe_intermediate_size": [32, 32]},
    "esm": {"vocab_size": VOCABULARY},
    "florence_vision": {
        "embed_dim": [16, 16, 32, 32],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "depths": [1, 1, 1, 1],
        "window_size": 2,
    },
    "gemma3n_text": {
        "intermediate_size": [128] * 5,
        "layer_types": SHARING,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {"global_head_dim": 2 * HEAD_WIDTH, "num_global_key_value_heads": 2},
    "gemma4_unified_text": {"global_head_dim": 2 * HEAD_WIDTH, "num_global_key_value_heads": 2},
    "glm5_next_text": {"index_kpool": 2, "qk_rope_head_dim": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]]},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "image_grid_pinpoints": [[28, 28]],
        "deepstack_layer_map": [[-2, 0], [-1, 2]],
    },
    "granitemoehybrid": {"layer_types": MIXED},
    "inkling_vision": {"patch_size": 4},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"]},
    "llava_next": {"image_grid_pinpoints": [[28, 28]]},
    "llava_next_video": {"image_grid_pinpoints": [[28, 28]]},
    "llava_onevision": {"image_grid_pinpoints": [[28, 28]]},
    "lilt": {"hidden_size": 48},  # six coordinates share the width
    "longcat_flash": {"zero_expert_num": 2},
    "markuplm": {"max_depth": 8},
    "molmo2_adapter": {"vision_feature_layer": [4, 2]},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [32] * 4, "depths": [1] * 4},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "paddleocr_vl_text": {"rope_parameters": SECTIONS},
    "perceiver": {"num_latents": 8, "num_self_attends_per_block": 2},
    "pp_formulanet_vision": {
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 32,
        "post_conv_out_channels": 64,
        "output_channels": 16,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 80, "vision_end_token_id": 79},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 80, "vision_end_token_id": 79},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_WIDTH,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "hash_seed": 0,
        # Its dropout seeds itself anew each time.
        "hidden_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "sam_vision_model": SAM,
    "step3p5": {"sliding_window": 4},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "hidden_size": 64},
    "vision-encoder-decoder": {"decoder_start_token_id": BOS, "pad_token_id": PAD},
    "vipllava": {"vision_feature_layers": [-2, -3, -4, -5, 3]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": HYBRID},
    "zamba2": {"layers_block_type": HYBRID},
    "zaya": {"num_experts_per_tok": 1},
}
# As above, by the model type of the outermost config: parts that it constrains.
ODD_PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    },
}

_COMPILED = [(re.compile(pattern), value) for pattern, value in RULES]


def small(name: str, default: Any) -> Any:
    """What the option `name` with this default becomes; the default itself where no rule applies."""
    if name in ALWAYS:
        return ALWAYS[name]
    pair = (
        isinstance(default, list | tuple)
        and len(default) == 2
        and name in ("image_size", "patch_size")
    )
    if pair:
        return type(default)([small(name, 1), small(name, 1)])
    if isinstance(default, bool) or not isinstance(default, int | float):
        return default
    for pattern, value in _COMPILED:
        if pattern.fullmatch(name) and (isinstance(value, float) or isinstance(default, int)):
            return value
    return default
