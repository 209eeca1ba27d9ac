"""What the generator cannot know of single architectures: a small table.

``config`` changes attributes after shrinking by name (dictionaries reach into nested configurations), ``head`` names the class
to build, ``inputs`` completes its inputs, ``refused`` says why an architecture is left out.
"""

from __future__ import annotations

from typing import Any

import torch

# Sections of a rotary embedding in several dimensions, whose default lengths stand in the models' code.
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_HALF_SECTIONS = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
    }
}

# The first width stands in the model's code.
_EFFICIENT = {
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "in_channels": [32, 16, 24, 40, 80, 112, 192],
    "out_channels": [16, 24, 40, 80, 112, 192, 320],
}


def _boxes(model: Any, batch: int, length: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A place on the page for every token."""
    return kwargs | {"bbox": torch.rand(batch, length, 4, generator=torch.Generator().manual_seed(length))}


EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{
        name: {"config": {"text_config": _SECTIONS}}
        for name in (
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen2_5_omni_thinker",
            "paddleocr_vl",
            "glm4v",
            "glm46v",
            "glm_ocr",
            "glm_image",
            "glmga",
        )
    },
    **{
        name: {"config": _SECTIONS}
        for name in ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "glm_image_text")
    },
    "hunyuan_vl": {"config": {"text_config": _SECTIONS}},
    "hunyuan_vl_text": {"config": _SECTIONS},
    "glm4v_moe": {"config": {"text_config": _HALF_SECTIONS}},
    "glm4v_moe_text": {"config": _HALF_SECTIONS},
    "bit": {"config": {"num_groups": 4}},
    "levit": {"config": {"patch_size": 16, "image_size": 64}},
    "efficientnet": {"config": _EFFICIENT},
    "align": {"config": {"vision_config": _EFFICIENT}},
    "lilt": {"config": {"hidden_size": 96}},
    "mimi": {"config": {"upsample_groups": 64}},
    "mimi_decoder": {"config": {"upsample_groups": 64}},
    "csm": {"config": {"codec_config": {"upsample_groups": 64}}},
    "kyutai_speech_to_text": {"config": {"codec_config": {"upsample_groups": 64}}},
    "glm5_next_text": {"config": {"index_topk": 16}},
    "glm5_next": {"config": {"text_config": {"index_topk": 16}}},
    "vjepa2": {"config": {"crop_size": 32, "frames_per_clip": 4}},
    "bros": {"inputs": _boxes},
    "layoutlmv3": {"config": {"coordinate_size": 12, "shape_size": 8}},
    "mobilevitv2": {"config": {"image_size": 128}},
    "lw_detr": {"config": {"backbone_config": {"image_size": 64}}},
    "lw_detr_vit": {"config": {"image_size": 64}},
    "depth_pro": {"refused": "its image encoders want sizes that are not small"},
    "longcat_flash": {"config": {"zero_expert_num": 2}},
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
