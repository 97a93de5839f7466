"""Causal attention by the Pallas kernel for TPUs that JAX ships (splash attention).

B batch, T length, N query heads, K kv heads, H head dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from jaxtune.attention.plain import NAME
from jaxtune.attention.share import shared

# Queries and keys of a block, and a head's width, are multiples of what a TPU's registers hold.
LANES = 128
BLOCKS = (512, 384, 256)


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Equals `attend` with `visible`, but for padding, whose queries see padding.  Blocks that the mask hides are not
    computed, so that a local layer costs its window.

    Args:
      window: how many keys back a query sees, itself included; None: all.
      interpret: run as plain operations, where there is no TPU.
    """
    T, H = q.shape[1], q.shape[3]
    padded, block = padded_length(T)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype).transpose(0, 2, 1, 3)
    q, k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, padded - T), (0, -H % LANES)]) for x in (q, k, v))
    segments = jnp.pad(segments, [(0, 0), (0, padded - T)])

    mask = masks.CausalMask((padded, padded)) if window is None else local_mask(padded, window)
    sizes = dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block)
    sizes |= dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block)
    how = {"block_sizes": kernels.BlockSizes(**sizes, use_fused_bwd_kernel=True), "attn_logits_soft_cap": softcap}
    how |= {"head_shards": 1, "q_seq_shards": 1, "residual_checkpoint_name": NAME, "interpret": interpret}

    def kernel(q, k, v, segments) -> Any:
        row = kernels.make_splash_mha(masks.MultiHeadMask([mask] * q.shape[1]), **how)
        return jax.vmap(lambda q, k, v, ids: row(q, k, v, segment_ids=kernels.SegmentIds(ids, ids)))(q, k, v, segments)

    return shared(kernel, q, k, v, segments)[:, :, :T, :H].transpose(0, 2, 1, 3)


def padded_length(length: int) -> tuple[int, int]:
    """(the length filled up to whole blocks, the block): the fewest slots, and of equal ones the largest block."""
    choices = ((-(-length // block) * block, block) for block in BLOCKS)
    return min(choices, key=lambda choice: (choice[0], -choice[1]))


def local_mask(length: int, window: int) -> masks.Mask:
    """Causal, and at most `window` keys with the query's own."""
    return masks.LocalMask((length, length), (window - 1, 0), 0)
