"""Cross-entropy over a large vocabulary without ever holding the logits of a whole batch.

B batch, T length, C positions of one chunk, D width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxtune.layers import constrain
from jaxtune.quant.box import Quantised
from jaxtune.typing import Tree

# Tokens whose logits exist at one time.  Fewer than 64 rows to a product slow a CPU down; more cost memory (V * 4 bytes
# each, 1 MB for Gemma).
CHUNK_TOKENS = 1024


def cross_entropy(
    hidden: Float[Array, "B T D"],
    table: Any,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    softcap: float | None,
) -> Float[Array, ""]:
    """Sum over tokens of weight * -log p(target), in float32.

    The gradient is computed in the forward pass, chunk by chunk, so that logits are formed once and never kept.  Where
    the table is frozen its gradient is dead code and XLA drops it.
    """
    if isinstance(table, Quantised):
        table = table.astype(hidden.dtype)  # once for all chunks
    # Under fsdp the table is gathered here, once, and not in every turn of the loop.
    table = constrain(table, "vocab", "activation")
    return _cross_entropy(softcap, chunked(hidden), table, chunked(targets), chunked(weights))


def chunked(x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "n B C *rest"]:
    """Positions in pieces of at most CHUNK_TOKENS tokens, the last one filled up with zeros."""
    B, T = x.shape[:2]
    size = min(T, max(1, CHUNK_TOKENS // B))
    x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(softcap, hidden, table, targets, weights):
    return _forward(softcap, hidden, table, targets, weights)[0]


def _forward(softcap, hidden, table, targets, weights):
    table_cast = table.astype(hidden.dtype)

    def one(carry, chunk):
        loss, d_table = carry
        h, target, weight = chunk  # [B, C, D], [B, C], [B, C]
        z = jnp.einsum("BCD,VD->BCV", h, table_cast, preferred_element_type=jnp.float32)
        if softcap is not None:
            z = jnp.tanh(z / softcap) * softcap
        # A comparison, not a gather: it stays in place when the vocabulary is sharded.
        hit = jax.lax.broadcasted_iota(jnp.int32, z.shape, 2) == target[:, :, None]
        log_total = jax.nn.logsumexp(z, axis=-1)
        loss += jnp.sum((log_total - jnp.sum(jnp.where(hit, z, 0.0), axis=-1)) * weight)
        g = (jnp.exp(z - log_total[:, :, None]) - hit.astype(jnp.float32)) * weight[:, :, None]
        if softcap is not None:
            g *= 1.0 - jnp.square(z / softcap)
        g = g.astype(h.dtype)
        d_hidden = jnp.einsum("BCV,VD->BCD", g, table_cast, preferred_element_type=jnp.float32).astype(h.dtype)
        d_table += jnp.einsum("BCV,BCD->VD", g, h, preferred_element_type=jnp.float32)
        return (loss, d_table), d_hidden

    start = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
    (loss, d_table), d_hidden = jax.lax.scan(one, start, (hidden, targets, weights))
    return loss, (d_hidden, d_table, table)


def _backward(softcap, residuals, g):
    d_hidden, d_table, table = residuals
    return (d_hidden * g.astype(d_hidden.dtype), (d_table * g).astype(table.dtype), None, None)


_cross_entropy.defvjp(_forward, _backward)


def hidden_of(model: Any, variables: Tree, batch: dict[str, Array], **how: Any) -> Float[Array, "B T D"]:
    """The final hidden states of a batch, of a decoder alone or behind an encoder.  how: as `model.apply`."""
    if "source_tokens" in batch:
        how |= {"source_tokens": batch["source_tokens"], "source_segments": batch["source_segment_ids"]}
    return model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"], **how)[0]


def batch_loss(model: Any, variables: Tree, batch: dict[str, Array], key: Array | None = None) -> Float[Array, ""]:
    """The summed loss of a batch; `key` turns dropout on."""
    hidden = hidden_of(model, variables, batch, rngs=None if key is None else {"dropout": key})
    table = model.apply(variables, method="head")
    return cross_entropy(hidden, table, batch["targets"], batch["weights"], model.config.final_softcap)
