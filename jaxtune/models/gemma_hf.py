"""Gemma as Hugging Face stores it: config.json read as inert data, and one row a weight.  Pure data, no jax.

Defaults are those of transformers' `GemmaConfig`, `Gemma2Config`, `Gemma3TextConfig`, because published config.json
files leave out what equals them.
"""

from typing import Any

from jaxtune.errors import UserError
from jaxtune.models import llama_hf
from jaxtune.models.values_hf import Rope, check_layer_types, check_sizes, read_rope

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

# Gemma 1 has the rows of Llama.  Gemma 2 and 3 have a norm after attention too, and one on each side of the MLP.
FOUR_NORMS: dict[str, tuple[str, str]] = {
    "layers/post_attn_norm/scale": ("model.layers.{i}.post_attention_layernorm.weight", "D"),
    "layers/pre_mlp_norm/scale": ("model.layers.{i}.pre_feedforward_layernorm.weight", "D"),
    "layers/post_mlp_norm/scale": ("model.layers.{i}.post_feedforward_layernorm.weight", "D"),
}


def rows(hf_config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The table of one model."""
    return llama_hf.ROWS if hf_config["model_type"] == "gemma" else llama_hf.ROWS | FOUR_NORMS


def _ropes(family: str, hf: dict[str, Any], layer_types: list[str]) -> list[Rope]:
    """One per layer, from either the old keys or transformers 5's `rope_parameters`."""
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
    ropes = {t: read_rope(v, family, ("default", "linear"), f" in its {t} layers") for t, v in by_type.items()}
    return [ropes[t] for t in layer_types]


def config_from_hf(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `DecoderConfig` (ropes as tuples), from a parsed config.json.

    Raises:
      UserError: naming the key that makes this a model that we would compute wrongly.
    """
    family = FAMILIES[config["model_type"]]
    # A multimodal checkpoint nests the text model; what stands outside it (tied or not) holds for it too.
    text = {**{k: v for k, v in config.items() if k == "tie_word_embeddings"}, **(config.get("text_config") or config)}
    hf = {**COMMON, **DEFAULTS[family], **{k: v for k, v in text.items() if v is not None}}
    for key in DEFAULTS[family]:
        # null is a value where the class's default is not None: Gemma 2 without soft-cap.
        if key in text and text[key] is None and key.endswith("softcapping"):
            hf[key] = None
    check_sizes(hf, [key for key, default in DEFAULTS[family].items() if isinstance(default, int)])
    for key in ("attention_bias", "use_bidirectional_attention"):
        if hf[key]:
            raise UserError(f"config.json says {key}={hf[key]!r}, which jaxtune's {family} does not have.")

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
    check_layer_types(layer_types, layers)
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
