"""Configs of small random models for whole runs, as `[model] config` takes them."""

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
DECODER = {"model_type": "llama", **SIZES, "max_position_embeddings": 128}
BERT = {
    "model_type": "bert",
    **SIZES,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 3,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
LLAVA = {
    "model_type": "llava",
    "text_config": DECODER,
    "vision_config": {
        "model_type": "clip_vision_model",
        **SIZES,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 16,
    },
}
# For each task of task_kinds.py.
OF_KINDS = {
    "pairs": BERT,
    "lengths": DECODER,
    "passages": BERT,
    "colours": DECODER,
    "choices": DECODER,
    "sentences": DECODER,
    "reversed": T5,
    "pictures": LLAVA,
}

# What tiny_model("zamba2") needs besides.
ZAMBA2 = {
    "num_hidden_layers": 5,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
    "n_mamba_heads": 2,
    "mamba_d_state": 4,
    "mamba_expand": 1,
    "mamba_ngroups": 1,
    "chunk_size": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "adapter_rank": 4,
    "num_mem_blocks": 1,
}
