"""NF4: four bits a weight on the quantiles of a normal distribution, in blocks of 64 with one scale each.

Dettmers et al. 2023 (QLoRA, arXiv 2305.14314); codes, scales and dequantised values are bitsandbytes' own.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

BLOCK = 64

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


def quantise(blocks: Float[Array, "N 64"]) -> tuple[UInt8[Array, "N 64"], Float[Array, "N"]]:
    """(codes, absmax) of blocks.  A block of zeros has code 7, which is zero."""
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    # By the reciprocal, as bitsandbytes.
    inverse = jnp.where(absmax > 0, 1.0 / absmax, 0.0)
    x = jnp.clip(blocks * inverse[:, None], -1.0, 1.0)
    codes = jnp.zeros(x.shape, jnp.uint8)
    for middle in MIDPOINTS:
        codes += (x > middle).astype(jnp.uint8)
    return codes, absmax


def dequantise(codes: UInt8[Array, "N 64"], absmax: Float[Array, "N"]) -> Float[Array, "N 64"]:
    values = jnp.take(jnp.asarray(CODES), codes.astype(jnp.int32), axis=0, mode="clip")
    return values * absmax[:, None]


def rounded(w: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """What bitsandbytes makes of a kernel: its blocks run along `in` of [out, in], and over the ends of rows."""
    flat = w.astype(jnp.float32).T.reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    return dequantise(*quantise(blocks)).reshape(-1)[: flat.size].reshape(w.shape[::-1]).T
