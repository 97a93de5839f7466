"""INT8: eight bits a weight, each output with the scale of its largest magnitude.

The weights of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) as bitsandbytes stores them: round(w * 127 / absmax).
Activations stay as they are; bitsandbytes rounds those to eight bits too.

I in, O out.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxtune.quant.box import Quantised, frozen_matmul


@struct.dataclass
class Int8(Quantised):
    """codes int8 [I, O], absmax float32 [O]; a table's are [V, D] and [V].  All may have a layer axis before.

    axis: along which one scale holds, -2 of a kernel and -1 of a table.
    """

    codes: Any
    absmax: Any
    dtype = jnp.dtype("float32")
    axis: int = struct.field(pytree_node=False, default=-2)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def astype(self, dtype: Any) -> Float[Array, "..."]:
        return (self.codes.astype(jnp.float32) * jnp.expand_dims(self.absmax / 127, self.axis)).astype(dtype)

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "... D"]:
        codes, absmax = (jnp.take(x, index, axis=0, mode="clip") for x in (self.codes, self.absmax))
        return codes.astype(jnp.float32) * (absmax / 127)[..., None]

    def matmul(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """The codes, which every float type holds exactly, are multiplied as they are, and the sums scaled."""
        return frozen_matmul(x, self.codes) * (self.absmax / 127)[None]


def quantise(w: Float[Array, "I O"], *, axis: int = -2) -> Int8:
    """One weight."""
    w = w.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(w), axis=axis)
    # By the reciprocal, as bitsandbytes: it decides what becomes of a value half-way between two codes.
    factor = jnp.where(absmax > 0, 1.0 / absmax, 0.0) * 127
    return Int8(jnp.round(w * jnp.expand_dims(factor, axis)).astype(jnp.int8), absmax, axis=axis)
