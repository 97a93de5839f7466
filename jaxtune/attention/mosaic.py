"""Causal attention by tokamax's kernel for Hopper and Blackwell GPUs, where it is installed (`jaxtune[kernels]`).

Of the kernels that there are it alone has a soft-cap in both passes and heads of 256.  cuDNN has no soft-cap, and its
form for packed rows wants their lengths, which are data here.

B batch, T length, N query heads, K kv heads, H head dim.
"""

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtune.attention.share import shared

# Beginnings of the names of GPUs that have the kernel's instructions.
KINDS = ("NVIDIA H100", "NVIDIA H200", "NVIDIA H800", "NVIDIA H20", "NVIDIA GH200", "NVIDIA B200", "NVIDIA GB200")


def serves(dtype: Any) -> bool:
    """Whether the kernel runs on the devices that a program is traced for."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    fits = device.platform == "gpu" and device.device_kind.startswith(KINDS) and jnp.dtype(dtype).itemsize == 2
    return fits and importlib.util.find_spec("tokamax") is not None


def mosaic(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
    window: Int[Array, ""],
    *,
    scale: float,
    softcap: float | None,
    operation: str = "mosaic_gpu",
) -> Float[Array, "B T N H"]:
    """Equals `attend` with `visible`, but for padding, whose queries see padding.  Blocks before a query's window or
    segment are not computed.

    Args:
      window: how many keys back a query sees, itself included.  operation: which of tokamax's.
    """
    attention, Mask = _tokamax()

    def kernel(q, k, v, segments):
        mask = Mask(k_start=first_keys(segments, window)[:, None], is_causal=True)
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        how = {"logits_scale": scale, "logits_soft_cap": softcap, "mask": mask}
        return attention[operation](q, k, v, **how).transpose(0, 2, 1, 3)

    return shared(kernel, q.transpose(0, 2, 1, 3), k, v, segments).transpose(0, 2, 1, 3)


def first_keys(segments: Int[Array, "B T"], window: Int[Array, ""]) -> Int[Array, "B T"]:
    """The slot of the first key that each token sees: its segment's first, or its window's."""
    slots = jnp.arange(segments.shape[1])[None]
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.maximum(jax.lax.cummax(jnp.where(begins, slots, 0), axis=1), slots - window + 1)


@functools.cache
def _tokamax() -> tuple[Any, Any]:
    """Its operations by name, and its masks.  The public function takes no first keys."""
    from absl import flags
    from tokamax._src.ops.attention import api, base  # type: ignore

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["jaxtune"])  # left to itself it would read our command line, and refuse it
    return api.IMPLEMENTATIONS, base.Mask
