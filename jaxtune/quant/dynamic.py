"""The dynamic map: 256 values in [-1, 1] or [0, 1], of which each decade below the largest has half as many.

For numbers of very different sizes, as the moments of Adam and the scales of other quantised numbers are.  Dettmers et
al. 2022 (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861); the values equal bitsandbytes'
`create_dynamic_map` to the bit, and codes are chosen by the rule of its CUDA kernels: the nearest value, the lower of
two that are equally near.  (Its CPU build looks codes up in a table, which near zero is up to seven codes off.)
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

Values = Float[np.ndarray, "256"]


def dynamic_map(signed: bool) -> Values:
    """The 256 values in order; a code is a place among them."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade + (0 if signed else 1))
        edges = _linspace(count + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [*middles, *-middles] if signed else [*middles]
    return np.sort(np.array(values, np.float32))


def _linspace(count: int) -> Float[np.ndarray, "_"]:
    """torch.linspace(0.1, 1, count) in float32, where its CPU build has fused multiply-add: from both ends inwards, and
    rounded once.  (Without, as on processors before AVX2, torch's and with it bitsandbytes' differs in last bits.)"""
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, first + step * i, last - step * i[::-1]).astype(np.float32)


def quantise(blocks: Float[Array, "*N B"], values: Values) -> tuple[UInt8[Array, "*N B"], Float[Array, "*N"]]:
    """(codes, largest magnitude of each block) of float32 blocks along the last axis; a block of zeros has scale 0."""
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    # By the reciprocal, as bitsandbytes; zeros stay zeros.
    inverse = jnp.where(absmax > 0, 1.0 / absmax, 0.0)[..., None]
    return nearest(jnp.clip(blocks * inverse, -1.0, 1.0), values), absmax


def dequantise(codes: UInt8[Array, "*N B"], absmax: Float[Array, "*N"], values: Values) -> Float[Array, "*N B"]:
    """The float32 numbers that the codes stand for."""
    return jnp.take(jnp.asarray(values), codes.astype(jnp.int32), axis=0, mode="clip") * absmax[..., None]


def nearest(x: Float[Array, "*N"], values: Values) -> UInt8[Array, "*N"]:
    """The code of each number: how many midpoints between neighbouring values lie below it."""
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    return jnp.searchsorted(jnp.asarray(midpoints), x, side="left").astype(jnp.uint8)
