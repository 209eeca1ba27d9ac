"""Make a configuration small by what its attributes are called, so that no architecture needs a configuration of its own.

Sizes are chosen unlike one another, so that a mistaken axis shows: 4 heads, 2 key-value heads, 16 features a head, 64 wide,
hidden 96 (48 in an expert), 4 experts of which 2 are visited, 160 tokens.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

WIDTH, HEADS, KV_HEADS, HEAD, HIDDEN, EXPERT_HIDDEN = 64, 4, 2, 16, 96, 48
LAYERS, EXPERTS, VISITED, VOCABULARY, POSITIONS = 2, 4, 2, 160, 128
IMAGE, PATCH, WINDOW = 32, 8, 6

# The first rule whose pattern is the whole name gives the value; a pair (value, "at most") only lowers.
RULES: tuple[tuple[str, Any], ...] = (
    (r"num_nextn_predict_layers|num_mtp.*|num_kv_shared_layers|mtp_num.*", 0),
    (r"mamba_(n|num)_heads", 2 * WIDTH // HEAD),
    (r"mamba_(d_head|head_dim)", HEAD),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"qk_head_dim", HEAD + HEAD // 2),
    (r"(.*_)?vocab_size(_.*)?|n_words|entity_vocab_size|type_vocab_size_?", VOCABULARY),
    (r"hidden_size_per_layer_input|.*_per_layer_(embed_)?dim", 16),
    (r"qk_rope_head_dim|.*rope_head_dim|rotary_dim", HEAD // 2),
    (r"(.*_)?(head_dim|d_kv|attention_head_size|head_size|d_head|kv_channels|head_features)", HEAD),
    (r"kv_lora_rank|(.*_)?kv_lora.*", 24),
    (r"q_lora_rank|(.*_)?lora_rank|(.*_)?(q|o)_lora.*", 32),
    (
        r"(.*_)?(num_)?(key_value|kv)_heads(_.*)?|n_head_kv|num_attention_groups|(.*_)?kv_n_heads|(linear_)?num_key_heads",
        KV_HEADS,
    ),
    (r"linear_num_key_heads|index_n_heads", KV_HEADS),
    (
        r"(.*_)?(num_)?(attention_)?n?_?heads?(_.*)?|n_heads?|nhead|num_attention_heads|(.*_)?n_heads|.*num_value_heads",
        HEADS,
    ),
    (
        r"(moe|expert|routed_expert|shared_expert)_?(.*_)?(intermediate|ffn|hidden).*(size|dim)|moe_latent_size",
        EXPERT_HIDDEN,
    ),
    (
        r"(.*_)?(intermediate_size|intermediate_dim|ffn_dim|d_ff|mlp_dim|n_inner|d_inner|inner_dim|ffn_hidden_size|mlp_hidden_size)(_mlp)?",
        HIDDEN,
    ),
    (r"shared_intermediate_size|.*feed_forward.*(size|dim)|.*ffn_embed_dim|filter_size", HIDDEN),
    (
        r"(.*_)?(num_hidden_layers|num_layers|n_layers?|(en|de)coder_layers|num_(en|de)coder_layers|depth|num_blocks|layers?_count)",
        LAYERS,
    ),
    (r"(vision|text|audio|speech|fusion|qformer|.*)_(num_)?(hidden_)?layers", (LAYERS, "at most")),
    (r"(.*_)?(num_|n_)?(local_|routed_|total_)?experts", EXPERTS),
    (
        r"(.*_)?(num_experts_per_tok(en)?|top_?k(_experts)?|moe_k|num_selected_experts|experts_per_token|num_experts_per_topk)",
        (VISITED, "at most"),
    ),
    (r"index_topk|.*index.*topk", 4),
    (r"n_groups?|num_expert_groups?", (2, "at most")),
    (r"topk_groups?", (1, "at most")),
    (r"first_k_dense_replace|num_dense_layers|n_hash_layers|num_hash_layers", (1, "at most")),
    (r"decoder_sparse_step|(.*_)?moe_layer_(step|frequency|interval|freq)", (1, "at most")),
    (r"(.*_)?(period|layer_interval|attention_interval|every_n_layers|sliding_window_pattern)", (2, "at most")),
    (r"(.*_)?offset", (1, "at most")),
    (r"sliding_window(_size)?|local_attention|attention_window|attention_chunk_size", WINDOW),
    (
        r"(max|n)_(text_)?positions?(_embeddings)?|max_(sequence|seq|target)_(length|len|positions)|context_length|(en|de)coder_max_.*positions",
        (POSITIONS, "at most"),
    ),
    (r"max_source_positions|max_position|block_size", (32, "at most")),
    (r"(.*_)?(image_size|img_size|input_size|pretrain_image_size)", IMAGE),
    (r"(.*_)?patch_size", (PATCH, "at most")),
    (r"query_pre_attn_scalar", HEAD),
    (r"(.*_)?projection_dim(_.*)?|proj_dim", 32),
    (
        r"(.*_)?(hidden_size|d_model|d_embed|embed_dim|n_embd|emb_dim|embedding_size|embedding_dim|model_dim|hidden_dim|output_dim)",
        WIDTH,
    ),
    (
        r"dim|width|dim_model|d_embedder|out_hidden_size|cross_hidden_size|.*_hidden_size|attention_hidden_size|lru_width",
        WIDTH,
    ),
    (r"state_size|.*d_state|ssm_state_size|.*state_dim", 8),
    (r"(.*_)?chunk_(size|length)", 8),
    (r"mamba_n_groups|.*ssm_groups", (1, "at most")),
    (r"n_mels|num_mel_bins", (32, "at most")),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 4),
    (r"num_codevectors_per_group|codebook_size", (16, "at most")),
    (r"(.*_)?codevector_dim|codebook_dim", (16, "at most")),
    (r"num_queries|num_query_tokens|num_latents", (6, "at most")),
)
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in RULES)
_WIDTHS = re.compile(
    r"(.*_)?(hidden_sizes|embed_dims?|embed_dim_per_stage|conv_dim|dims|encoder_hidden_sizes|neck_hidden_sizes|channels)"
)
_DEPTHS = re.compile(r"depths?|layers|num_blocks|stage_depths|.*_depths|(.*_)?block_repeats|blocks_per_stage")
_STAGED = re.compile(r"depths?|.*_depths|blocks_per_stage|num_block_repeats")
_STAGED_SIZES = {"image_size": 2 * IMAGE, "window_size": 2}  # a window fits in the last stage
_FIRST_WIDTH = re.compile(r"embed_dim|.*embeds_hidden_size")  # of the first stage; it doubles with each
_LAYER_NUMBERS = re.compile(r"(.*_)?(layers|layer_ids|indices|indexes|idxs|idx|layers_idx|moe_layers)")
_TOKENS = re.compile(r"(.*_)?token_(id|index)|(.*_)?token_ids")


# For attributes that a class leaves open, though its models cannot be made without.
OPEN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "head_dim": HEAD,
    "num_key_value_heads": KV_HEADS,
    "n_routed_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": VISITED,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "linear_num_key_heads": KV_HEADS,
    "linear_num_value_heads": HEADS,
    "linear_key_head_dim": HEAD,
    "linear_value_head_dim": HEAD,
}


def shrink(config: Any, changes: dict[str, Any] | None = None, *, nested: bool = False, fill: bool = False) -> Any:
    """A small configuration of the same class.

    Parameters
    ----------
    config
        The default one, or a part of it.
    changes
        Exceptions: attribute to value, dictionaries for nested configurations.
    nested
        Whether it is a part of another.
    fill
        Whether attributes that are None get a value, where one is known.
    """
    changes = dict(changes or {})
    cls = type(config)
    canonical = {theirs: ours for ours, theirs in getattr(cls, "attribute_map", {}).items()}
    fields = _fields(cls)
    given: dict[str, Any] = _own_values(config, fields) if nested else {}
    staged = _staged(config, fields)
    chosen = [] if staged else _chosen_layers(config, fields)
    depth = changes.get("num_hidden_layers", max(LAYERS, len(chosen)))
    tokens = 3
    for name in fields:
        value = read(config, name)
        if _is_config(value) and str(getattr(value, "model_type", "")).startswith("timm"):
            given[name] = _plain_backbone(value)
        elif _is_config(value):
            given[name] = shrink(value, changes.pop(name, None), nested=True, fill=fill)
        elif name in changes:
            pass
        elif value is None and fill and name in OPEN:
            given[name] = OPEN[name]
        elif name == "num_key_value_heads" and "kv_lora_rank" in fields:  # latent attention has no groups
            given[name] = HEADS
        elif name == "head_dim" and "qk_rope_head_dim" in fields:  # of the rotated part, in latent attention
            given[name] = HEAD // 2
        elif _TOKENS.fullmatch(name):
            if isinstance(value, int) and value >= 0 and not isinstance(value, bool):
                special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
                if name not in special:
                    tokens += 1
                given[name] = special.get(name, VOCABULARY - tokens)
        elif name == "rope_parameters" or name == "rope_scaling":
            if isinstance(value, dict) and (rope := _rope(value)) != value:
                given[name] = rope
        elif isinstance(value, list | tuple):
            new = _sequence(name, value, config, chosen, depth)
            if new is not None:
                given[name] = new
        elif staged and (_is_depth(name, canonical) or name == "num_stages"):
            pass  # as many as there are stages
        elif staged and isinstance(value, int) and name in _STAGED_SIZES:
            given[name] = _STAGED_SIZES[name]
        elif staged and _FIRST_WIDTH.fullmatch(name) and isinstance(value, int):
            given[name] = max(HEAD, HEAD // 2 * _first_heads(config))
        elif isinstance(value, int) and not isinstance(value, bool):
            new = _number(name, value)
            if new is None and name in canonical:
                new = _number(canonical[name], value)
            if new is not None and new != value:
                given[name] = depth if new == LAYERS and _is_depth(name, canonical) else new
    given.update(changes)
    return cls(**given)


def _plain_backbone(config: Any) -> Any:
    """A small ResNet in place of a backbone that needs another package."""
    from transformers import ResNetConfig

    stages = [i for i in (getattr(config, "out_indices", None) or [4]) if i > 0] or [4]
    return ResNetConfig(  # type: ignore[no-untyped-call]
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic", out_indices=stages
    )


def read(config: Any, name: str) -> Any:
    """An attribute; of one that differs by layer, the value for all others."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # a class of transformers' own for an attribute that differs by layer
        return vars(config).get(name)


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_diff_dict") and hasattr(value, "model_type")


def _fields(cls: Any) -> list[str]:
    """What a configuration is made of: its fields, or, in releases where it is no dataclass, what its class and parents take."""
    if dataclasses.is_dataclass(cls):
        return [f.name for f in dataclasses.fields(cls) if not f.name.startswith("_")]
    found: dict[str, None] = {}
    for base in cls.__mro__:
        if "model_type" not in vars(base) or base.__name__ in ("PreTrainedConfig", "PretrainedConfig"):
            break
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            found |= dict.fromkeys(p.name for p in parameters if p.name != "self" and p.kind not in _VARIADIC)
            if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
                break
    return list(found)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _own_values(config: Any, fields: list[str]) -> dict[str, Any]:
    """What a parent gave to this part, as far as it differs from the class's own default."""
    try:
        plain = type(config)()
    except Exception:  # noqa: BLE001  # a part that cannot stand alone is kept as it is
        return {n: read(config, n) for n in fields}
    skipped = {"transformers_version", "architectures", "dtype"}
    return {
        n: v
        for n in fields
        if n not in skipped and isinstance(v := read(config, n), bool | float | str) and v != read(plain, n)
    }


def _is_depth(name: str, canonical: dict[str, str]) -> bool:
    return "num_hidden_layers" in (name, canonical.get(name)) or name in ("num_layers", "n_layer", "n_layers")


def _number(name: str, value: int) -> int | None:
    if value <= 0:
        return None
    for pattern, new in _COMPILED:
        if pattern.fullmatch(name):
            return min(new[0], value) if isinstance(new, tuple) else int(new)
    return None


def _staged(config: Any, fields: list[str]) -> bool:
    """Whether a model narrows an image stage by stage, with a list that says how deep each stage is."""
    depths = [read(config, n) for n in fields if _STAGED.fullmatch(n)]
    return any(isinstance(d, list | tuple) and len(d) > 1 and all(isinstance(e, int) for e in d) for d in depths)


def _first_heads(config: Any) -> int:
    for name in ("num_heads", "num_attention_heads"):
        heads = read(config, name)
        if isinstance(heads, list | tuple) and heads and isinstance(heads[0], int):
            return heads[0]
    return 1


def _depth_of(config: Any) -> int:
    count = read(config, "num_hidden_layers")
    return count if isinstance(count, int) else 0


def _per_layer(config: Any, fields: list[str]) -> dict[str, list[Any]]:
    """Lists with one entry a layer."""
    count = _depth_of(config)
    return {
        n: list(v)
        for n in fields
        if count > 2
        and isinstance(v := read(config, n), list | tuple)
        and len(v) == count
        and all(isinstance(e, str | int | float | bool | None) for e in v)
    }


def _chosen_layers(config: Any, fields: list[str]) -> list[int]:
    """The fewest layers, in order, in which every kind of layer of the default configuration comes at least once."""
    lists = _per_layer(config, fields)
    lists = {n: v for n, v in lists.items() if len(set(v)) <= 6}
    chosen: list[int] = []
    seen: set[tuple[str, Any]] = set()
    for i in range(_depth_of(config)):
        here = {(name, values[i]) for name, values in lists.items()}
        if not here <= seen:
            seen |= here
            chosen.append(i)
    if lists:
        for i in range(_depth_of(config)):
            if len(chosen) >= LAYERS:
                break
            if i not in chosen:
                chosen.append(i)
    return sorted(chosen)


def _sequence(name: str, value: Any, config: Any, chosen: list[int], depth: int) -> Any:
    kind = type(value)
    chosen = [] if _WIDTHS.fullmatch(name) else chosen
    plain = all(isinstance(e, str | int | float | bool | None) for e in value)
    if len(value) > 2 and len(value) == _depth_of(config) and chosen and plain:
        picked = [value[i] for i in chosen]
        small = [_number(name, e) if isinstance(e, int) and not isinstance(e, bool) else None for e in picked]
        picked = [e if new is None else new for e, new in zip(picked, small, strict=True)]
        return kind((picked * depth)[:depth])
    if not value or not all(isinstance(e, int) and not isinstance(e, bool) for e in value):
        return None
    if re.fullmatch(r"(.*_)?(image_size|img_size|input_size)", name):
        return kind([IMAGE] * len(value))
    if _DEPTHS.fullmatch(name):
        return kind(min(v, LAYERS) for v in value)
    if _WIDTHS.fullmatch(name):
        factor = 1
        while max(value) // factor > 128 and all(v % (factor * 2) == 0 and v // (factor * 2) >= 8 for v in value):
            factor *= 2
        return kind(v // factor for v in value)
    if _LAYER_NUMBERS.fullmatch(name) and min(value) >= 0:
        return kind(v for v in value if v < depth) or kind([depth - 1])
    return None


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    new = dict(parameters)
    for key, value in parameters.items():
        if isinstance(value, dict):
            new[key] = _rope(value)
        elif key.endswith("mrope_section") and isinstance(value, list):
            total = int(HEAD // 2 * float(parameters.get("partial_rotary_factor", 1.0)))
            share = total // len(value)
            new[key] = [total - share * (len(value) - 1)] + [share] * (len(value) - 1)
        elif key == "original_max_position_embeddings":
            new[key] = POSITIONS
    return new
