"""T5 as Hugging Face stores it (v1.0, v1.1, Flan; mT5, which is v1.1 with a larger vocabulary): config.json read as
inert data, and one row a weight.  Pure data, no jax.

Defaults are those of transformers' `T5Config` and `MT5Config`.

Whether the head is tied, and whether the decoder's output is scaled before it, were one key until transformers 5
(`tie_word_embeddings`: v1.0 is tied and scaled, v1.1 neither).  Transformers 5 writes `tie_word_embeddings: true` into
every T5's config, and the second as `scale_decoder_outputs`; there the tensors say whether the head is tied.
"""

from collections.abc import Collection
from typing import Any

from jaxtune.errors import UserError

FAMILIES = {"t5": "t5", "mt5": "mt5"}

DEFAULTS: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "feed_forward_proj": "relu",
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
}
DEFAULTS["mt5"] = DEFAULTS["t5"] | {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}

# transformers' ACT2FN, by what we call them.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "silu": "silu",
    "swish": "silu",
}

HEAD = "lm_head.weight"

# Linear layers that transformers keeps as they are where it quantises the others (`_keep_in_fp32_modules`).
NEVER_QUANTISED = ("mlp/down/kernel",)


def _attention(ours: str, theirs: str) -> dict[str, tuple[str, str]]:
    return {f"{ours}/{name}/kernel": (f"{theirs}.{name}.weight", "O I -> I O") for name in "qkvo"}


def _stack(name: str, mlp: int) -> dict[str, tuple[str, str]]:
    """What encoder and decoder both have.  mlp: the place of the MLP in a block."""
    block, first = f"{name}.block.{{i}}.layer", f"{name}.block.0.layer.0.SelfAttention"
    return {
        f"{name}/layers/pre_attn_norm/scale": (f"{block}.0.layer_norm.weight", "D"),
        **_attention(f"{name}/layers/attn", f"{block}.0.SelfAttention"),
        f"{name}/layers/pre_mlp_norm/scale": (f"{block}.{mlp}.layer_norm.weight", "D"),
        f"{name}/layers/mlp/down/kernel": (f"{block}.{mlp}.DenseReluDense.wo.weight", "O I -> I O"),
        f"{name}/relative_bias/table": (f"{first}.relative_attention_bias.weight", "buckets N"),
        f"{name}/final_norm/scale": (f"{name}.final_layer_norm.weight", "D"),
    }


# One row a weight, as in `gemma_hf.ROWS`.
ROWS: dict[str, tuple[str, str]] = {
    "embed/table": ("shared.weight", "V D"),
    **_stack("encoder", mlp=1),
    **_stack("decoder", mlp=2),
    "decoder/layers/pre_cross_norm/scale": ("decoder.block.{i}.layer.1.layer_norm.weight", "D"),
    **_attention("decoder/layers/cross", "decoder.block.{i}.layer.1.EncDecAttention"),
    "lm_head/table": (HEAD, "V D"),
}
WIDENING = {True: {"gate": "wi_0", "up": "wi_1"}, False: {"up": "wi"}}  # by whether the MLP is gated


def rows(hf_config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The table of one model."""
    _, gated = _activation(_with_defaults(hf_config))
    wide = {}
    for name, mlp in (("encoder", 1), ("decoder", 2)):
        module = f"{name}.block.{{i}}.layer.{mlp}.DenseReluDense"
        for ours, theirs in WIDENING[gated].items():
            wide[f"{name}/layers/mlp/{ours}/kernel"] = (f"{module}.{theirs}.weight", "O I -> I O")
    return ROWS | wide


def settled(hf_config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The config with `tie_word_embeddings` and `scale_decoder_outputs` as they truly are.

    Args:
      names: of the checkpoint's tensors.
    """
    hf, says = _with_defaults(hf_config), hf_config.get("tie_word_embeddings")
    scaled = hf["model_type"] == "t5" and hf.get("scale_decoder_outputs", says is not False)
    # A config of transformers 4 is right about it, and a head beside it a copy.
    written_by_5 = "scale_decoder_outputs" in hf_config or hf["model_type"] == "mt5"
    tied = HEAD not in names if written_by_5 and says is not False else says is not False
    return hf_config | {"tie_word_embeddings": tied, "scale_decoder_outputs": bool(scaled)}


def config_from_hf(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `T5Config`, from a parsed config.json (`settled`, where there is a checkpoint).

    Raises:
      UserError: naming the key that makes this a model that we would compute wrongly.
    """
    hf = _with_defaults(settled(config, ()) if "scale_decoder_outputs" not in config else config)
    hf["num_decoder_layers"] = hf.get("num_decoder_layers") or hf["num_layers"]
    for key in (*DEFAULTS["t5"], "num_decoder_layers"):
        low = 0 if key.endswith("token_id") else 1
        if key in ("layer_norm_epsilon", "feed_forward_proj", "dropout_rate"):
            continue
        if not isinstance(hf[key], int) or isinstance(hf[key], bool) or hf[key] < low:
            raise UserError(f"config.json says {key}={hf[key]!r}. It must be an integer of at least {low}.")
    if not isinstance(hf["dropout_rate"], (int, float)) or not 0 <= hf["dropout_rate"] < 1:
        raise UserError(f"config.json says dropout_rate={hf['dropout_rate']!r}. It is a probability below 1.")
    buckets, distance = hf["relative_attention_num_buckets"], hf["relative_attention_max_distance"]
    if buckets < 4 or distance <= buckets // 2:
        raise UserError(
            f"config.json says relative_attention_num_buckets={buckets} and relative_attention_max_distance={distance}."
            " There must be at least 4 buckets, and half of them less than the distance."
        )
    activation, gated = _activation(hf)
    return {
        "family": FAMILIES[config["model_type"]],
        "vocab_size": hf["vocab_size"],
        "width": hf["d_model"],
        "hidden": hf["d_ff"],
        "heads": hf["num_heads"],
        "head_dim": hf["d_kv"],
        "encoder_layers": hf["num_layers"],
        "layers": hf["num_decoder_layers"],
        "activation": activation,
        "gated": gated,
        "norm_eps": hf["layer_norm_epsilon"],
        "buckets": buckets,
        "max_distance": distance,
        "scaled": bool(hf["scale_decoder_outputs"]),
        "tied": bool(hf["tie_word_embeddings"]),
        "dropout": float(hf["dropout_rate"]),
        "start_id": hf["decoder_start_token_id"],
        "pad_id": hf["pad_token_id"],
    }


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    return DEFAULTS[FAMILIES[config["model_type"]]] | {k: v for k, v in config.items() if v is not None}


def _activation(hf: dict[str, Any]) -> tuple[str, bool]:
    """(our name of it, whether the MLP is gated) of `feed_forward_proj`, as `T5Config` reads it."""
    asked = hf["feed_forward_proj"]
    kind, _, name = str(asked).rpartition("-")
    name = hf.get("dense_act_fn") or ("gelu_new" if asked == "gated-gelu" else name)
    if kind not in ("", "gated") or name not in ACTIVATIONS:
        raise UserError(
            f"config.json says feed_forward_proj={asked!r}, which is {name!r}. It is an activation, or "
            f"gated-ACTIVATION, of: {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name], bool(hf.get("is_gated_act", kind == "gated"))
