"""Cross-entropy over a large vocabulary without the logits of a batch: of training, of evaluation and of scores.

Each device goes through its own tokens in chunks, and on TPUs through the vocabulary in blocks (`how.py` says when, and
`passes.py` has the loops).  In every order a number is the same but for rounding: products have the activations' dtype
and float32 sums, everything behind them is float32.

B batch, T length, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from jaxtune.loss import passes
from jaxtune.loss.how import How, choose, shards, specs
from jaxtune.quant.box import Quantised
from jaxtune.typing import Tree


def cross_entropy(
    hidden: Float[Array, "B T D"],
    table: Any,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    softcap: float | None,
    z_loss: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(what is trained on, the cross-entropy alone): sums over tokens, in float32; gradients are of the first.

    The second is the sum of weight * -log p(target).  The first has weight * z_loss * log(Z) ** 2 besides, where Z is
    the sum of exp(logit): it keeps logits from drifting (PaLM, arXiv 2204.02311, section 5).

    Args:
      table: [V, D], or the box of a quantised one, through which no gradient flows.
    """
    tokens = flat(hidden, targets, weights)
    both: Any = _losses(choose(len(tokens[1]), table, softcap, z_loss), tokens[0], table, *tokens[1:])
    return both[0], jax.lax.stop_gradient(both[1])


def token_scores(
    hidden: Float[Array, "B T D"],
    table: Any,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    softcap: float | None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """(log p(target), whether no word is likelier) at each position; (0, False) where the weight is zero."""
    B, T = targets.shape
    h, target, weight = flat(hidden, targets, weights)
    how = choose(len(target), table, softcap)
    ins = "tokens", "table", "tokens", "tokens"
    logprobs, best = on_each(how, passes.scores, ins, ("tokens", "tokens"), table)(h, table, target, weight)
    return logprobs[: B * T].reshape(B, T), best[: B * T].reshape(B, T)


def flat(*of_batch: Array) -> tuple[Array, ...]:
    """[B, T, ...] to [N, ...], filled up with zeros where the devices do not divide a batch."""
    whole = [x.reshape(-1, *x.shape[2:]) for x in of_batch]
    fill = -len(whole[0]) % shards() if of_batch[0].shape[0] % shards() else 0
    return tuple(jnp.pad(x, ((0, fill),) + ((0, 0),) * (x.ndim - 1)) if fill else x for x in whole)


def on_each(
    how: How, local: Callable[..., Any], ins: tuple[str, ...], outs: tuple[str, ...], table: Any
) -> Callable[..., Any]:
    """`local` on every device with its own part of the arguments, which `ins` and `outs` name by `specs`."""
    run, places = functools.partial(local, how), specs(how)
    if jax.sharding.get_abstract_mesh().size <= 1:
        return run
    # The codes of a box are whole everywhere: formats differ in what may be cut.
    inside = places | ({"table": places["whole"]} if isinstance(table, Quantised) else {})
    return jax.shard_map(
        run, in_specs=tuple(inside[i] for i in ins), out_specs=tuple(places[o] for o in outs), check_vma=False
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(how, hidden, table, targets, weights):
    ins = "tokens", "table", "tokens", "tokens"
    return on_each(how, passes.totals, ins, ("whole", "tokens"), table)(hidden, table, targets, weights)[0]


def _forward(how, *given):
    """Only the gradients that are asked for are made: no compiler has to find out that a frozen table's is not used."""
    hidden, table, targets, weights = jax.tree.map(lambda x: x.value, given)
    wanted = tuple(any(leaf.perturbed for leaf in jax.tree.leaves(x)) for x in given[:2])
    # What says in the backward pass whether, and in which dtype.
    like = tuple(jnp.zeros((), x.dtype) if wants else None for x, wants in zip((hidden, table), wanted, strict=True))
    ins = "tokens", "table", "tokens", "tokens"
    if how.blocks == 1:
        local = functools.partial(passes.slopes, wanted)
        outs = "whole", "tokens", "table"
        loss, *slopes = on_each(how, local, ins, outs, table)(hidden, table, targets, weights)
        return loss, (like, slopes)
    loss, log_total = on_each(how, passes.totals, ins, ("whole", "tokens"), table)(hidden, table, targets, weights)
    return loss, (like, (hidden, table, targets, weights, log_total))


def _backward(how, kept, g):
    like, rest = kept
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    if how.blocks > 1:
        local = functools.partial(passes.slopes, tuple(x is not None for x in like))
        ins = "tokens", "table", "tokens", "tokens", "tokens"
        _, *rest = on_each(how, local, ins, ("whole", "tokens", "table"), rest[1])(*rest)
    # Of hidden states the gradient has their dtype already, of the table float32.
    d_hidden, d_table = (
        None if x is None else (x * g[0].astype(x.dtype)).astype(d.dtype) for x, d in zip(rest, like, strict=True)
    )
    return d_hidden, d_table, None, None


_losses.defvjp(_forward, _backward, symbolic_zeros=True)


def hidden_of(model: Any, variables: Tree, batch: dict[str, Array], **how: Any) -> Float[Array, "B T D"]:
    """The final hidden states of a batch, of a decoder alone or behind an encoder.  how: as `model.apply`."""
    if "source_tokens" in batch:
        how |= {"source_tokens": batch["source_tokens"], "source_segments": batch["source_segment_ids"]}
    return model.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"], **how)[0]


def batch_losses(
    model: Any, variables: Tree, batch: dict[str, Array], key: Array | None = None, z_loss: float = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(what is trained on, the cross-entropy alone) of a batch, summed; `key` turns dropout on."""
    hidden = hidden_of(model, variables, batch, rngs=None if key is None else {"dropout": key})
    table = model.apply(variables, method="head")
    return cross_entropy(hidden, table, batch["targets"], batch["weights"], model.config.final_softcap, z_loss)


def batch_loss(model: Any, variables: Tree, batch: dict[str, Array]) -> Float[Array, ""]:
    """The summed loss of a batch, without dropout."""
    return batch_losses(model, variables, batch)[0]
