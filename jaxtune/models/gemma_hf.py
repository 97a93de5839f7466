"""Gemma as Hugging Face stores it: config.json read as inert data, and one row a weight.  Pure data, no jax.

Defaults are those of transformers' `GemmaConfig`, `Gemma2Config`, `Gemma3TextConfig`, because published config.json
files leave out what equals them.
"""

from typing import Any

from jaxtune.errors import UserError

FAMILIES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3"}

COMMON = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": None,
    "layer_types": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
    },
    "gemma2": {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": None,
        # Transformers' Gemma 3 reads this key and applies nothing; so do we.
        "attn_logit_softcapping": None,
    },
}

# One row a weight, read both ways: jaxtune path -> (Hugging Face name, how its dimensions map).  `{i}` is the layer.
# "O I -> I O" is a matrix that transforms; "V D" and "D" are stored as they are.
ROWS: dict[str, tuple[str, str]] = {
    "embed/table": ("model.embed_tokens.weight", "V D"),
    "layers/pre_attn_norm/scale": ("model.layers.{i}.input_layernorm.weight", "D"),
    "layers/attn/q/kernel": ("model.layers.{i}.self_attn.q_proj.weight", "O I -> I O"),
    "layers/attn/k/kernel": ("model.layers.{i}.self_attn.k_proj.weight", "O I -> I O"),
    "layers/attn/v/kernel": ("model.layers.{i}.self_attn.v_proj.weight", "O I -> I O"),
    "layers/attn/o/kernel": ("model.layers.{i}.self_attn.o_proj.weight", "O I -> I O"),
    "layers/attn/q_norm/scale": ("model.layers.{i}.self_attn.q_norm.weight", "H"),
    "layers/attn/k_norm/scale": ("model.layers.{i}.self_attn.k_norm.weight", "H"),
    "layers/post_attn_norm/scale": ("model.layers.{i}.post_attention_layernorm.weight", "D"),
    "layers/pre_mlp_norm/scale": ("model.layers.{i}.pre_feedforward_layernorm.weight", "D"),
    "layers/mlp/gate/kernel": ("model.layers.{i}.mlp.gate_proj.weight", "O I -> I O"),
    "layers/mlp/up/kernel": ("model.layers.{i}.mlp.up_proj.weight", "O I -> I O"),
    "layers/mlp/down/kernel": ("model.layers.{i}.mlp.down_proj.weight", "O I -> I O"),
    "layers/post_mlp_norm/scale": ("model.layers.{i}.post_feedforward_layernorm.weight", "D"),
    "final_norm/scale": ("model.norm.weight", "D"),
    "lm_head/table": ("lm_head.weight", "V D"),
}

# Gemma 1 has no norm after attention: what it calls post_attention_layernorm stands before the MLP.
GEMMA1_ROWS = {"layers/pre_mlp_norm/scale": ("model.layers.{i}.post_attention_layernorm.weight", "D")}


def rows(hf_config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The table of one model."""
    return ROWS | GEMMA1_ROWS if hf_config["model_type"] == "gemma" else ROWS


def _ropes(family: str, hf: dict[str, Any], layer_types: list[str]) -> list[tuple[float, float]]:
    """(theta, factor) per layer, from either the old keys or transformers 5's `rope_parameters`."""
    new, scaling = hf["rope_parameters"] or {}, hf["rope_scaling"]
    if family == "gemma3":
        by_type = {
            "full_attention": {"rope_theta": hf["rope_theta"] or 1_000_000.0, **(scaling or {})},
            "sliding_attention": {"rope_theta": hf.get("rope_local_base_freq") or 10_000.0},
        }
        for kind, values in by_type.items():
            values.update(new.get(kind) or {})
    else:
        both = {"rope_theta": hf["rope_theta"] or 10_000.0, **(scaling or {}), **new}
        by_type = {"full_attention": both, "sliding_attention": both}
    for kind, values in by_type.items():
        rope_type = values.get("rope_type", values.get("type", "default"))
        if rope_type not in ("default", "linear"):
            raise UserError(
                f"config.json asks for rope type {rope_type!r} in its {kind} layers. "
                f"{family} supports: default, linear."
            )
        if rope_type == "default":
            values["factor"] = 1.0
    return [(float(by_type[t]["rope_theta"]), float(by_type[t]["factor"])) for t in layer_types]


def config_from_hf(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `DecoderConfig` (ropes as pairs), from a parsed config.json.

    Raises:
      UserError: naming the key that makes this a model that we would compute wrongly.
    """
    family = FAMILIES[config["model_type"]]
    # A multimodal checkpoint nests the text model; what stands outside it (tied or not) holds for it too.
    text = {**{k: v for k, v in config.items() if k == "tie_word_embeddings"}, **(config.get("text_config") or config)}
    hf = {**COMMON, **DEFAULTS[family], **{k: v for k, v in text.items() if v is not None}}
    for key, default in DEFAULTS[family].items():
        # null is a value where the class's default is not None: Gemma 2 without soft-cap.
        if key in text and text[key] is None and key.endswith("softcapping"):
            hf[key] = None
        elif isinstance(default, int) and not (isinstance(hf[key], int) and hf[key] > 0):
            raise UserError(f"config.json says {key}={hf[key]!r}. It must be a positive integer.")
    for key in ("attention_bias", "use_bidirectional_attention"):
        if hf[key]:
            raise UserError(f"config.json says {key}={hf[key]!r}, which jaxtune's {family} does not have.")
    if hf["num_attention_heads"] % hf["num_key_value_heads"]:
        raise UserError(
            f"config.json says num_attention_heads={hf['num_attention_heads']} and "
            f"num_key_value_heads={hf['num_key_value_heads']}. The first must be a multiple of the second."
        )

    layers = hf["num_hidden_layers"]
    if family == "gemma":
        layer_types = ["full_attention"] * layers
        # "gelu" in the first Gemma configs always meant the tanh approximation (transformers#29402).
        activation = text.get("hidden_activation") or text.get("hidden_act") or "gelu_pytorch_tanh"
        activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    else:
        every = {"gemma2": 2, "gemma3": hf.get("sliding_window_pattern", 6)}[family]
        layer_types = hf["layer_types"] or [
            "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)
        ]
        activation = hf.get("hidden_activation", "gelu_pytorch_tanh")
    if activation not in ("gelu_pytorch_tanh", "gelu"):
        raise UserError(f"config.json says the activation is {activation!r}. It can be: gelu_pytorch_tanh, gelu.")
    if len(layer_types) != layers or set(layer_types) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"config.json lists {len(layer_types)} layer_types {sorted(set(layer_types))} for {layers} layers. "
            "Each layer is full_attention or sliding_attention."
        )
    return {
        "family": family,
        "vocab_size": hf["vocab_size"],
        "width": hf["hidden_size"],
        "hidden": hf["intermediate_size"],
        "heads": hf["num_attention_heads"],
        "kv_heads": hf["num_key_value_heads"],
        "head_dim": hf["head_dim"],
        "query_scale": hf.get("query_pre_attn_scalar", hf["head_dim"]) ** -0.5,
        "activation": activation,
        "norm_eps": hf["rms_norm_eps"],
        "norm_offset": 1.0,
        "embed_scale": hf["hidden_size"] ** 0.5,
        "windows": tuple(hf["sliding_window"] if t == "sliding_attention" else None for t in layer_types),
        "ropes": tuple(_ropes(family, hf, layer_types)),
        "attention_softcap": hf["attn_logit_softcapping"] if family == "gemma2" else None,
        "final_softcap": hf.get("final_logit_softcapping"),
        "post_norms": family != "gemma",
        "qk_norm": family == "gemma3",
        "tied": bool(hf["tie_word_embeddings"]),
    }
