"""Where LoRA's A and B start: peft's `init_lora_weights`.

  True        A ~ U(±1/sqrt(in)) (Kaiming with a = sqrt(5)), B = 0
  False       B ~ U(±1/sqrt(r)) too
  gaussian    A ~ N(0, 1/r²), B = 0
  orthogonal  A and B random in orthogonal halves of the rank, so that A B = 0
  pissa       A, B from the largest singular values of W (Meng et al. 2024, arXiv 2404.02948); pissa_niter_N: by N
              rounds of subspace iteration instead of a whole SVD
  olora       A, B from the QR decomposition of Wᵀ (Büyükakyüz 2024, arXiv 2406.01775)
  loftq       A, B from the largest singular values of what NF4 loses of W (Li et al. 2023, arXiv 2310.08659)

The last three take s A B off the base, so that training starts at the base's own function.  jaxtune leaves the base as
it is and subtracts the initial product instead.  (peft's LoftQ puts the rounded weight in W's place; W - s A B is that
but for what the rank cannot hold.)  Over a base that is quantised the rounded weight is in W's place already, and LoftQ
is plain LoRA that starts there, as peft's `replace_lora_weights_loftq` makes it.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.peft.method import Site
from jaxtune.quant import nf4

NAMES = ("gaussian", "orthogonal", "pissa", "olora", "loftq")


class Values(NamedTuple):
    """a [L, in, R], b [L, R, out]; taken: whether their product belongs off the base."""

    a: Any
    b: Any
    taken: bool = False


def check(how: Any) -> None:
    """Refuses what does not exist.

    Raises:
      ValueError: naming what does.
    """
    if how is True or how is False or how in NAMES or (isinstance(how, str) and re.fullmatch(r"pissa_niter_\d+", how)):
        return
    raise ValueError(
        f"init_lora_weights is {how!r}. jaxtune supports: True, False, {', '.join(map(repr, NAMES))}, 'pissa_niter_N'."
    )


def alters_base(how: Any) -> bool:
    return isinstance(how, str) and how.startswith(("pissa", "olora", "loftq"))


def check_base(how: Any, rounds: int, quant: str | None) -> None:
    """Refuses starts that need the weights as they were before they were quantised.

    Raises:
      UserError: naming what can be done.
    """
    if quant is None or not alters_base(how):
        return
    if how != "loftq":
        raise UserError(
            f"init_lora_weights={how!r} takes the largest part of each weight off the base, and `model.quant` is "
            f"{quant}: what is left would have to be quantised anew. Take loftq, or an unquantised base."
        )
    if quant != "nf4" or rounds > 1:
        raise UserError(
            f"`model.quant` is {quant}, and LoftQ has {rounds} rounds. Over a quantised base it is what one rounding "
            "to nf4 loses; further rounds would change the base. Set model.quant=nf4 and loftq_iter=1."
        )


def needs_even(how: Any) -> bool:
    return how == "orthogonal"


def draw(
    key: jax.Array,
    site: Site,
    ranks: tuple[int, ...],
    scale: np.ndarray,
    how: Any,
    w: Any,
    rounds: int = 1,
    lost: Any = None,
) -> Values:
    """One site's first values, zero beyond each layer's rank.

    Args:
      scale: what multiplies A B in each layer [L].  w: the base's weight [L, in, out].
      rounds: of LoftQ, each rounding what the last left of W.  lost: of a quantised base, see `Start`; else None.
    """
    L, R, (rows, columns) = len(ranks), max(ranks), site.shape[1:]
    live = jnp.asarray(np.arange(R)[None] < np.array(ranks)[:, None], jnp.float32)  # [L, R]
    r = jnp.asarray(np.maximum(np.array(ranks, np.float32), 1)[:, None, None])
    key_a, key_b = jax.random.split(key)

    def uniform(key: jax.Array, shape: tuple[int, ...]) -> Any:
        return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)

    b = jnp.zeros((L, R, columns))
    if lost is not None:
        u, s, v = lost
        a, b = _halves(u, s, v, jnp.asarray(scale))
    elif alters_base(how):
        a, b = _from_weight(how, key, w.astype(jnp.float32), R, jnp.asarray(scale), rounds)
    elif how == "orthogonal":
        a, b = _orthogonal(key, ranks, rows, columns)
    elif how == "gaussian":
        a = jax.random.normal(key_a, (L, rows, R)) / r
    else:
        a = uniform(key_a, (L, rows, R)) * rows**-0.5
        b = uniform(key_b, b.shape) / jnp.sqrt(r) if how is False else b
    return Values(a * live[:, None, :], b * live[:, :, None], alters_base(how) and lost is None)


def _from_weight(how: str, key: jax.Array, w: Any, rank: int, scale: Any, rounds: int) -> tuple[Any, Any]:
    if how == "olora":
        q, r = jnp.linalg.qr(jnp.swapaxes(w, 1, 2))  # Wᵀ = Q R
        return jnp.swapaxes(r[:, :rank], 1, 2), jnp.swapaxes(q[:, :, :rank], 1, 2)
    if how == "loftq":
        u, s, v = _largest(w - jax.lax.map(nf4.rounded, w), rank)
        for _ in range(rounds - 1):
            u, s, v = _largest(w - jax.lax.map(nf4.rounded, w - (u * s[:, None, :]) @ v), rank)
    elif how == "pissa":
        u, s, v = _largest(w, rank)
    else:
        u, s, v = _subspace_svd(key, w, rank, int(how.rsplit("_", 1)[-1]))
    return _halves(u, s, v, scale)


def _halves(u: Any, s: Any, v: Any, scale: Any) -> tuple[Any, Any]:
    root = jnp.sqrt(s / scale[:, None])
    return u * root[:, None, :], v * root[:, :, None]


def _largest(w: Any, rank: int) -> tuple[Any, Any, Any]:
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    return u[:, :, :rank], s[:, :rank], v[:, :rank]


def _subspace_svd(key: jax.Array, w: Any, rank: int, rounds: int) -> tuple[Any, Any, Any]:
    """The largest singular values by subspace iteration (Halko et al. 2011, as torch's `svd_lowrank`)."""
    wide = jnp.swapaxes(w, 1, 2)
    q, _ = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[0], w.shape[2], rank)))
    for _ in range(rounds):
        q, _ = jnp.linalg.qr(wide @ q)
        q, _ = jnp.linalg.qr(w @ q)
    u, s, v = jnp.linalg.svd(jnp.swapaxes(q, 1, 2) @ w, full_matrices=False)
    return q @ u, s, v


def _orthogonal(key: jax.Array, ranks: tuple[int, ...], rows: int, columns: int) -> tuple[Any, Any]:
    """A = X Q[0::2] / 10 and B = Q[1::2]ᵀ Y / 10, whose product is 0 because Q's rows are orthogonal."""
    R, a, b = max(ranks), [], []
    for layer, r in enumerate(ranks):
        keys = jax.random.split(jax.random.fold_in(key, layer), 3)
        q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (r, r)))
        x, y = jax.random.normal(keys[1], (rows, r // 2)), jax.random.normal(keys[2], (r // 2, columns))
        a.append(jnp.pad(x @ q[0::2] / 10, ((0, 0), (0, R - r))))
        b.append(jnp.pad(q[1::2].T @ y / 10, ((0, R - r), (0, 0))))
    return jnp.stack(a), jnp.stack(b)
