"""Weights that bitsandbytes has quantised, as transformers stores them: read as they are.

Beside `X.weight`, whose bytes are codes, lie its scales and maps: of four bits (`bitsandbytes.functional.QuantState`)
`.absmax`, `.quant_map`, `.nested_absmax`, `.nested_quant_map` and `.quant_state.bitsandbytes__nf4`, a JSON object; of
eight bits (`bitsandbytes.nn.Int8Params`) `X.SCB` and `X.weight_format`.
"""

import json
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.quant import NF4, Int8, Scheme, nf4

STATE = ".quant_state.bitsandbytes__nf4"
BESIDE_4BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE, ".quant_state.bitsandbytes__fp4")
BESIDE_8BIT = {".SCB": ".weight", ".weight_format": ".weight"}


def owner_of(name: str) -> tuple[str, str] | None:
    """(the weight's name, what this is of it) of a tensor that belongs to a quantised weight."""
    for suffix in BESIDE_4BIT:
        if name.endswith(".weight" + suffix):
            return name.removesuffix(suffix), suffix
    for suffix, weight in BESIDE_8BIT.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix) + weight, suffix
    return None


def scheme_in(hf_config: dict[str, Any]) -> Scheme | None:
    """How a checkpoint's weights are quantised, of its parsed config.json.

    Raises:
      UserError: by another library, or in another way.
    """
    found = hf_config.get("quantization_config") or (hf_config.get("text_config") or {}).get("quantization_config")
    if not found:
        return None
    kind = None
    if found.get("quant_method", "bitsandbytes") == "bitsandbytes":
        kind = "int8" if found.get("load_in_8bit") else "nf4" if found.get("bnb_4bit_quant_type") == "nf4" else None
    if kind is None:
        ways = {key: found[key] for key in ("quant_method", "bnb_4bit_quant_type", "bits") if key in found}
        raise UserError(
            f"The checkpoint's config.json says that its weights are quantised: {ways}. jaxtune reads bitsandbytes' "
            "nf4 and int8. Give the unquantised checkpoint, with `model.quant`."
        )
    return Scheme(kind, kind == "nf4" and bool(found.get("bnb_4bit_use_double_quant")))


def shape_of(name: str, shape: tuple[int, ...], beside: dict[str, Callable[[], np.ndarray]]) -> tuple[int, ...]:
    """Of the weight that stored bytes stand for.

    Raises:
      UserError: bytes of a kind that jaxtune does not read.
    """
    if ".SCB" in beside:
        return shape
    return tuple(_state(name, beside)["shape"])


def box_of(name: str, codes: np.ndarray, beside: dict[str, Callable[[], np.ndarray]]) -> NF4 | Int8:
    """The kernel [I, O] of a stored linear layer [O, I], as a box of numpy arrays.

    Raises:
      UserError: it is stored in another way than bitsandbytes' default.
    """
    if ".SCB" in beside:
        return Int8(codes.T, beside[".SCB"]().astype(np.float32).reshape(-1))
    state, tensors = _state(name, beside), {key: read() for key, read in beside.items() if key != STATE}
    O, I = state["shape"]
    maps = {".quant_map": nf4.CODES, ".nested_quant_map": nf4.NESTED_CODES}
    for key, ours in maps.items():
        if key in tensors and not np.allclose(tensors[key], ours, rtol=0, atol=1e-6):
            raise UserError(f"{name}{key} is not bitsandbytes' own; jaxtune reads no other.")
    pairs = codes.reshape(O, I // 2)
    whole = np.stack([pairs >> 4, pairs & 15], axis=2).reshape(O, I).T
    packed = nf4.pack(whole.reshape(I // nf4.BLOCK, nf4.BLOCK, O), -2)
    absmax, dtype = tensors[".absmax"].reshape(O, I // nf4.BLOCK).T, jnp.dtype(state["dtype"])
    if ".nested_absmax" not in tensors:
        return NF4(packed, absmax.astype(np.float32), dtype=dtype)
    offset = np.float32(state["nested_offset"])
    return NF4(packed, absmax, tensors[".nested_absmax"].astype(np.float32), offset, dtype=dtype)


def _state(name: str, beside: dict[str, Callable[[], np.ndarray]]) -> dict[str, Any]:
    if STATE not in beside:
        raise UserError(f"{name} is stored in bytes without {STATE[1:]}: it is not bitsandbytes' nf4.")
    state = json.loads(bytes(beside[STATE]()))
    needed = {"blocksize": nf4.BLOCK} | ({"nested_blocksize": nf4.NESTED_BLOCK} if "nested_blocksize" in state else {})
    wrong = {key: state.get(key) for key, value in needed.items() if state.get(key) != value}
    if wrong or len(state.get("shape", ())) != 2 or state["shape"][1] % nf4.BLOCK:
        raise UserError(
            f"{name} has shape {state.get('shape')} in blocks of {state.get('blocksize')} (scales: "
            f"{state.get('nested_blocksize')}). jaxtune reads nf4 in blocks of {nf4.BLOCK} (scales: "
            f"{nf4.NESTED_BLOCK}) whose inputs are a multiple of {nf4.BLOCK}."
        )
    return state
