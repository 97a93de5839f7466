"""One optimiser step and one evaluation step, as pure functions.

The model's variables are a tree `{params, adapters}`.  By path, each leaf is either trainable or frozen; both sides are
flat dicts, and the tree is put together again inside the step.  Full fine-tuning is the same sentence with other leaves
on the trainable side.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxtune import tree
from jaxtune.loss import batch_loss, batch_losses
from jaxtune.state import State
from jaxtune.typing import Tree


def train_step(
    state: State,
    frozen: dict[str, Array],
    batch: dict[str, Array],
    *,
    model: Any,
    structure: Tree,
    optimiser: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    z_loss: float = 0.0,
    penalty: Callable[..., Float[Array, ""]] | None = None,
) -> tuple[State, dict[str, Array]]:
    """One update from a global batch of A micro-batches, [A, B, T].

    Each micro-batch's summed loss is divided by the target tokens of the whole global batch, so that A micro-batches
    give the gradient of one large batch whatever their lengths.  Dropout's keys are a function of (seed, step,
    micro-batch).

    Args:
      z_loss: of `jaxtune.loss.cross_entropy`.  penalty: (trainable, frozen) to what a method adds to the loss.  The
        loss that is reported is without both: it is that of evaluation, and of runs that have neither.
    """
    total = jnp.sum(batch["weights"])
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_of(trainable, micro, index):
        variables = tree.unflatten(structure, frozen | trainable)
        both = batch_losses(model, variables, micro, jax.random.fold_in(key, index), z_loss)
        trained, entropy = (x / jnp.maximum(total, 1.0) for x in both)
        return trained, entropy

    def accumulate(carry, xs):
        (_, entropy), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trainable, *xs)
        return jax.tree.map(jnp.add, carry, (entropy, grads)), None

    start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.trainable))
    (loss, grads), _ = jax.lax.scan(accumulate, start, (batch, jnp.arange(batch["weights"].shape[0])))

    if penalty is not None:
        grads = jax.tree.map(jnp.add, grads, jax.grad(penalty)(state.trainable, frozen))
    updates, opt_state = optimiser.update(grads, state.opt_state, state.trainable)
    trainable: Any = optax.apply_updates(state.trainable, updates)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "target_tokens": total,
    }
    return State(state.step + 1, trainable, opt_state), metrics


def eval_step(
    trainable: dict[str, Array], frozen: dict[str, Array], batch: dict[str, Array], *, model: Any, structure: Tree
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(summed loss, target tokens) of one batch [B, T], without dropout."""
    variables = tree.unflatten(structure, frozen | trainable)
    return batch_loss(model, variables, batch), jnp.sum(batch["weights"])
