"""Llama and its kin, Mistral and Qwen 3, as Hugging Face stores them.  Pure data, no jax.

Defaults are those of transformers' `LlamaConfig`, `MistralConfig`, `Qwen3Config`, because published config.json files
leave out what equals them.  None: said by other keys.
"""

from typing import Any

from jaxtune.errors import UserError
from jaxtune.models.values_hf import Rope, check_layer_types, check_sizes, read_rope

FAMILIES = {"llama": "llama", "mistral": "mistral", "qwen3": "qwen3"}
# Model types with like names, and why they are none of these.
NOT_HERE = {
    "qwen2": "its q, k and v have biases, which linear layers here have not",
    "mixtral": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
    "llama4": "it is a mixture of experts that reads images",
    "llama4_text": "it is a mixture of experts",
    "mllama": "it reads images through layers of its own",
    "mistral3": "it reads images",
    "ministral": "its layers have windows by turns",
}
KINDS = ("default", "linear", "llama3")  # of rotary positions

COMMON = {
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
    "layer_types": None,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "sliding_window": None,
    },
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen3": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "head_dim": 128,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

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
    # The norm before the MLP, whatever it is called.
    "layers/pre_mlp_norm/scale": ("model.layers.{i}.post_attention_layernorm.weight", "D"),
    "layers/mlp/gate/kernel": ("model.layers.{i}.mlp.gate_proj.weight", "O I -> I O"),
    "layers/mlp/up/kernel": ("model.layers.{i}.mlp.up_proj.weight", "O I -> I O"),
    "layers/mlp/down/kernel": ("model.layers.{i}.mlp.down_proj.weight", "O I -> I O"),
    "final_norm/scale": ("model.norm.weight", "D"),
    "lm_head/table": ("lm_head.weight", "V D"),
}


def rows(hf_config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The table of one model."""
    return ROWS


def _windows(family: str, hf: dict[str, Any]) -> tuple[int | None, ...]:
    """One per layer; None: it sees everything before it."""
    layers, window = hf["num_hidden_layers"], hf["sliding_window"]
    if family == "llama" or (family == "qwen3" and not hf["use_sliding_window"]):
        window = None
    if window is not None and (not isinstance(window, int) or window <= 0):
        raise UserError(f"config.json says sliding_window={window!r}. It must be a positive integer, or null.")
    if family == "qwen3":
        first = hf["max_window_layers"]
        by_depth = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(layers)]
    else:
        by_depth = ["full_attention" if window is None else "sliding_attention"] * layers
    layer_types = hf["layer_types"] or by_depth
    check_layer_types(layer_types, layers)
    if layer_types != by_depth and (family != "qwen3" or window is None):
        raise UserError(
            f"config.json says sliding_window={window!r} and lists layer_types {sorted(set(layer_types))}. A {family} "
            f"has such a window in {'the layers it names' if family == 'qwen3' else 'all layers or in none'}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _rope(family: str, hf: dict[str, Any]) -> Rope:
    """From the old keys, transformers 5's `rope_parameters`, or both: files have had a theta in the one and the rest in
    the other.  Where they contradict each other the old ones count (`convert_rope_params_to_dict`)."""
    new, old = hf["rope_parameters"] or {}, hf["rope_scaling"] or {}
    for key, said in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(said, dict) or any(isinstance(value, dict) for value in said.values()):
            raise UserError(f"config.json says {key}={said!r}. A {family} has the same in all layers, by its numbers.")
    old = {("rope_type" if key == "type" and "rope_type" not in old else key): value for key, value in old.items()}
    rope = {"rope_theta": hf["rope_theta"], **new, **old}
    length = "original_max_position_embeddings"
    return read_rope(
        rope | {length: hf.get(length) or rope.get(length) or hf["max_position_embeddings"]}, family, KINDS
    )


def config_from_hf(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `DecoderConfig` (ropes as tuples), from a parsed config.json.

    Raises:
      UserError: naming the key that makes this a model that we would compute wrongly.
    """
    family = FAMILIES[config["model_type"]]
    # null is a value for a window, and elsewhere means the default.
    given = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    hf = {**COMMON, **DEFAULTS[family], **given}
    if hf["num_key_value_heads"] is None:
        hf["num_key_value_heads"] = hf["num_attention_heads"]
    if hf["head_dim"] is None:
        check_sizes(hf | {"head_dim": 2}, SIZES)
        if hf["hidden_size"] % hf["num_attention_heads"]:
            raise UserError(
                f"config.json says hidden_size={hf['hidden_size']} and num_attention_heads="
                f"{hf['num_attention_heads']}, and no head_dim. The first must be a multiple of the second."
            )
        hf["head_dim"] = hf["hidden_size"] // hf["num_attention_heads"]
    check_sizes(hf, SIZES)
    if hf["head_dim"] % 2:
        raise UserError(f"config.json makes head_dim {hf['head_dim']}. Rotary positions need an even one.")
    for key in ("attention_bias", "mlp_bias"):
        if hf[key]:
            raise UserError(f"config.json says {key}={hf[key]!r}. Linear layers with biases are not here.")
    if hf["hidden_act"] != "silu":
        raise UserError(f"config.json says hidden_act={hf['hidden_act']!r}. A {family} has: silu.")
    windows = _windows(family, hf)
    return {
        "family": family,
        "vocab_size": hf["vocab_size"],
        "width": hf["hidden_size"],
        "hidden": hf["intermediate_size"],
        "heads": hf["num_attention_heads"],
        "kv_heads": hf["num_key_value_heads"],
        "head_dim": hf["head_dim"],
        "query_scale": hf["head_dim"] ** -0.5,
        "activation": "silu",
        "norm_eps": hf["rms_norm_eps"],
        "norm_offset": 0.0,
        "embed_scale": 1.0,
        "windows": windows,
        "ropes": (_rope(family, hf),) * len(windows),
        "attention_softcap": None,
        "final_softcap": None,
        "post_norms": False,
        "qk_norm": family == "qwen3",
        "tied": bool(hf["tie_word_embeddings"]),
    }
