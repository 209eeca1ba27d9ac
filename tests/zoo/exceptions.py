"""What the generator cannot know of single architectures: a small table.

``config`` changes attributes after shrinking by name (dictionaries reach into nested configurations), ``head`` names the class
to build, ``refused`` says why an architecture is left out.
"""

from __future__ import annotations

from typing import Any

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "mamba2": {"config": {"num_heads": 8, "head_dim": 16, "n_groups": 1}},
    "jamba": {
        "config": {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        }
    },
    "bamba": {"config": {"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16}},
    "gpt_neo": {"config": {"attention_types": [[["global", "local"], 1]]}},
    "dbrx": {"config": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}}},
    "xmod": {"config": {"default_language": "en_XX"}},
    "esmc": {"config": {"num_key_value_heads": 4}},
    "moonshine": {"config": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4}},
    "reformer": {
        "config": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]}
    },
    "blt": {"config": {"encoder_hash_byte_group_vocab": 100}},
    "perceiver": {"config": {"d_latents": 64, "d_model": 64, "num_latents": 6, "num_self_attends_per_block": 2}},
    "deepseek_v2": {"config": {"num_experts_per_tok": 2, "n_routed_experts": 4}},
    "dots1": {
        "config": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    },
    "esm": {"config": {"pad_token_id": 0, "mask_token_id": 3}},
    "lfm2_moe": {"config": {"layer_types": ["conv", "full_attention"]}},
    "moonshine_streaming": {"config": {"num_key_value_heads": 4}},
    "musicgen": {"refused": "generates sound from several codebooks; its text encoder is t5"},
    "musicgen_melody": {"refused": "generates sound from several codebooks; its text encoder is t5"},
    "timm_wrapper": {"refused": "wraps a model of another package, timm"},
    "timm_backbone": {"refused": "wraps a model of another package, timm"},
    "encoder-decoder": {"refused": "joins two models that are here already"},
    "speech-encoder-decoder": {"refused": "joins two models that are here already"},
    "vision-encoder-decoder": {"refused": "joins two models that are here already"},
    "vision-text-dual-encoder": {"refused": "joins two models that are here already"},
}
