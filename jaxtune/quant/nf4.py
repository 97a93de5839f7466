"""NF4: four bits a weight on the quantiles of a normal distribution, in blocks of 64 with one scale each.

Dettmers et al. 2023 (QLoRA, arXiv 2305.14314); codes, scales and dequantised values are bitsandbytes' own, by its CUDA
rule where its CPU build differs (the 8-bit codes of scales).  bitsandbytes' blocks run along the last axis of what
Hugging Face stores: along `in` of a linear layer [out, in], which is the first axis of a kernel here, and along the
width of a table [V, D].

Two codes share a byte: places i and 32 + i of a block, the first in the high half.  (bitsandbytes pairs neighbours.
Halves are put together again by whole rows, which TPUs do three times as fast.)

I in, O out; J blocks of one column: I/64.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from jaxtune.quant import dynamic
from jaxtune.quant.box import Quantised

BLOCK = 64
# Scales that share one of the second level (double quantisation).
NESTED_BLOCK = 256

CODES = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
# A value above the i-th of these has a code above i; one on it has the lower.
MIDPOINTS = (CODES[:-1] + CODES[1:]) / np.float32(2)

NESTED_CODES = dynamic.dynamic_map(signed=True)


@struct.dataclass
class NF4(Quantised):
    """codes uint8 [I/2, O].  absmax [I/64, O]: float32; or, quantised themselves, their 8-bit codes, with nested
    [⌈I/64·O/256⌉] and offset [] in float32.  All may have a layer axis before.

    axis: along which blocks run, -2 of a kernel (the shapes above) and -1 of a table.  dtype: what the weight had when
    it was quantised, to which dequantised numbers are rounded first, as bitsandbytes does.
    """

    codes: Any
    absmax: Any
    nested: Any = None
    offset: Any = None
    axis: int = struct.field(pytree_node=False, default=-2)
    dtype: Any = struct.field(pytree_node=False, default=jnp.dtype("float32"))

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] *= 2
        return tuple(shape)

    def astype(self, dtype: Any) -> Float[Array, "..."]:
        return _decode(self.codes, self.scales(), self.axis).astype(self.dtype).astype(dtype)

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "... D"]:
        codes, scales = (jnp.take(x, index, axis=0, mode="clip") for x in (self.codes, self.scales()))
        return _decode(codes, scales, self.axis).astype(self.dtype)

    def scales(self) -> Float[Array, "... J O"]:
        """The float32 absmax of each block."""
        if self.nested is None:
            return self.absmax
        rows, columns = self.absmax.shape[-2:]
        i, j = np.arange(rows)[:, None], np.arange(columns)[None]
        # Blocks of the second level run over the scales as Hugging Face's weight lies in memory.
        place = (j * rows + i if self.axis == -2 else i * columns + j) // NESTED_BLOCK
        values = jnp.take(jnp.asarray(NESTED_CODES), self.absmax.astype(jnp.int32), axis=0, mode="clip")
        factors = jnp.take(self.nested, jnp.asarray(place, jnp.int32), axis=-1, mode="clip")
        offset = self.offset[..., None, None]
        # The product is rounded before the sum, as bitsandbytes has it.  Left alone, compilers multiply and add in one;
        # so they do here, with a zero that they cannot foresee (of a number that is not finite it would be none).
        return (values * factors + (offset - offset)) + offset


def quantise(w: Float[Array, "I O"], *, double: bool = False, axis: int = -2) -> NF4:
    """One weight, whose axis `axis` is a multiple of 64."""
    codes, absmax = _encode(_blocks(w.astype(jnp.float32), axis, BLOCK), axis)
    box = NF4(pack(codes, axis), absmax, axis=axis, dtype=w.dtype)
    return quantise_scales(box) if double else box


def quantise_scales(box: NF4) -> NF4:
    """The same codes, with the scales of one weight in 8 bits."""
    stored = box.absmax.T if box.axis == -2 else box.absmax  # as in Hugging Face's order
    offset = jnp.mean(box.absmax)
    flat = stored.reshape(-1) - offset
    blocks = jnp.pad(flat, (0, -flat.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    codes, nested = dynamic.quantise(blocks, NESTED_CODES)
    codes = codes.reshape(-1)[: flat.size].reshape(stored.shape)
    return dataclasses.replace(box, absmax=codes.T if box.axis == -2 else codes, nested=nested, offset=offset)


def pack(codes: Any, axis: int) -> Any:
    """Codes [..., J, 64, ...], in blocks along `axis`, to two a byte: [..., J * 32, ...].  Of numpy or jax."""
    halves = _blocks(codes, axis, BLOCK // 2)
    high, low = halves.take(0, axis - 1), halves.take(1, axis - 1)
    return _joined((high << 4) | low, axis)


def rounded(w: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """What bitsandbytes makes of a kernel of any size: there blocks run over the ends of rows."""
    flat = w.astype(jnp.float32).T.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    codes, absmax = _encode(blocks, -1)
    values = jnp.asarray(CODES)[codes.astype(jnp.int32)] * absmax[:, None]
    return values.reshape(-1)[: flat.size].reshape(w.shape[::-1]).T


def _encode(blocks: Float[Array, "..."], axis: int) -> tuple[UInt8[Array, "..."], Float[Array, "..."]]:
    """(codes, absmax) of blocks along `axis`.  A block of zeros has code 7, which is zero."""
    absmax = jnp.max(jnp.abs(blocks), axis=axis)
    # By the reciprocal, as bitsandbytes.
    inverse = jnp.where(absmax > 0, 1.0 / absmax, 0.0)
    x = jnp.clip(blocks * jnp.expand_dims(inverse, axis), -1.0, 1.0)
    codes = jnp.zeros(x.shape, jnp.uint8)
    for middle in MIDPOINTS:
        codes += (x > middle).astype(jnp.uint8)
    return codes, absmax


def _decode(codes: UInt8[Array, "..."], scales: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The float32 values of packed codes."""
    halves = _blocks(codes, axis, BLOCK // 2)
    whole = jnp.concatenate([halves >> 4, halves & jnp.uint8(15)], axis=axis)
    values = jnp.take(jnp.asarray(CODES), whole.astype(jnp.int32), axis=0, mode="clip")
    return _joined(values * jnp.expand_dims(scales, axis), axis)


def _blocks(x: Any, axis: int, size: int) -> Any:
    """[..., n * size, ...] to [..., n, size, ...]."""
    place = x.ndim + axis
    return x.reshape(*x.shape[:place], x.shape[place] // size, size, *x.shape[place + 1 :])


def _joined(x: Any, axis: int) -> Any:
    """The way back."""
    place = x.ndim + axis
    return x.reshape(*x.shape[: place - 1], x.shape[place - 1] * x.shape[place], *x.shape[place + 1 :])
