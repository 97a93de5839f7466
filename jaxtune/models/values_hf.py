"""Values of config.json that decoders of several families read alike: sizes, kinds of layers, rotary positions.

Everything is checked before it is used; what we would compute wrongly is refused by its key.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxtune.errors import UserError

# One layer's rotary embedding: theta, the factor by which positions are divided, and None or llama3's three numbers:
# low_freq_factor, high_freq_factor, original_max_position_embeddings.
Rope = tuple[float, float, tuple[float, float, float] | None]

LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def check_sizes(hf: Mapping[str, Any], keys: Collection[str]) -> None:
    """Refuses sizes that are no positive integers, and query heads that kv heads cannot share.

    Raises:
      UserError: naming the key.
    """
    for key in keys:
        if not isinstance(hf[key], int) or isinstance(hf[key], bool) or hf[key] <= 0:
            raise UserError(f"config.json says {key}={hf[key]!r}. It must be a positive integer.")
    if hf["num_attention_heads"] % hf["num_key_value_heads"]:
        raise UserError(
            f"config.json says num_attention_heads={hf['num_attention_heads']} and "
            f"num_key_value_heads={hf['num_key_value_heads']}. The first must be a multiple of the second."
        )


def check_layer_types(layer_types: Sequence[str], layers: int) -> None:
    """Refuses a list that does not say of each layer whether it is global or has a window.

    Raises:
      UserError: with what it says.
    """
    if len(layer_types) != layers or set(layer_types) - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"config.json lists {len(layer_types)} layer_types {sorted(set(layer_types))} for {layers} layers. "
            "Each layer is full_attention or sliding_attention."
        )


def read_rope(values: Mapping[str, Any], family: str, kinds: Sequence[str], where: str = "") -> Rope:
    """What transformers 5 calls `rope_parameters`, and before it `rope_theta` and `rope_scaling` said together.

    Args:
      values: rope_theta, rope_type (once: type) and what that type needs.  kinds: the types that the family has.
      where: " in its … layers", for errors.

    Raises:
      UserError: another type, or a number that is missing or cannot be.
    """
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in kinds:
        raise UserError(f"config.json asks for rope type {kind!r}{where}. {family} supports: {', '.join(kinds)}.")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json says partial_rotary_factor={values['partial_rotary_factor']!r}; here whole heads are rotated."
        )
    needed = ("rope_theta", *({"linear": ("factor",), "llama3": ("factor", *LLAMA3)}.get(kind, ())))
    for key in needed:
        number = values.get(key)
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 < number < float("inf"):
            raise UserError(f"config.json says {key}={number!r} of its {kind} rope{where}. It is a positive number.")
    if kind == "llama3" and not values["low_freq_factor"] < values["high_freq_factor"]:
        raise UserError(
            f"config.json says low_freq_factor={values['low_freq_factor']} and high_freq_factor="
            f"{values['high_freq_factor']}. The first must be less than the second."
        )
    theta, factor = float(values["rope_theta"]), float(values["factor"] if kind != "default" else 1.0)
    return theta, factor, tuple(float(values[key]) for key in LLAMA3) if kind == "llama3" else None  # type: ignore[return-value]
