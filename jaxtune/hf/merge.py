"""Adapters folded into the weights that they adapt, written as a Hugging Face checkpoint.

First the model is run both ways, with its adapters and with every weight as the file will have it: what differs is
never written.  Then one tensor after the other is merged on the devices and goes to its shard; neither the devices nor
the host ever hold a merged copy of the model.

On a tied model an adapter of the embedding does not reach the head, nor the other way round, so that the merged model
has two matrices and `tie_word_embeddings` is false; trained token rows are the head's too, and leave it tied.  (peft's
`merge_and_unload` adds an embedding's LoRA to both.)
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune import tree
from jaxtune.errors import ExportError, UserError
from jaxtune.hf.base import Base
from jaxtune.hf.rows import Row
from jaxtune.hf.weights import write_checkpoint
from jaxtune.layers import matmul
from jaxtune.peft.method import Layout, from_variables, layer_of, to_variables
from jaxtune.typing import Tree

# Largest difference of float32 logits, to the largest of them: sums in another order, through every layer.
TOLERANCE = 1e-4


@struct.dataclass
class Merged:
    """Stands at a weight and gives it as the merged checkpoint has it, one layer at a time inside the scan.

    inner: the adapter, None where there is none; shared: what it has in common with other layers.  dtype: the file's.
    """

    inner: Any
    shared: Any
    dtype: Any = struct.field(pytree_node=False)

    @property
    def ties(self) -> bool:
        return getattr(self.inner, "ties", False)

    def merged(self, w):
        adapter = self.inner if self.shared is None else self.inner.replace(shared=self.shared)
        w = w.astype(jnp.float32)
        return (w if adapter is None else adapter.merged(w)).astype(self.dtype)

    def linear(self, x, y, w, rng):
        return matmul(x, self.merged(w))

    def weight(self, w):
        return self.merged(w)

    def embed(self, table, tokens):
        return jnp.take(self.merged(table), tokens, axis=0, mode="clip")


def merged_variables(layout: Layout, variables: Tree, dtype: Any) -> Tree:
    """The same variables with a `Merged` at every weight, adapted or not: all are rounded to the file's dtype."""
    found = from_variables(variables) if "adapters" in variables else {}
    wrapped = {}
    for site in layout.sites:
        adapter, shared = found.get(site.path), getattr(found.get(site.path), "shared", None)
        adapter = adapter if adapter is None or shared is None else adapter.replace(shared=None)
        wrapped[site.path] = Merged(adapter, shared, dtype)
    return {"params": variables["params"]} | to_variables(wrapped)


def check_mergeable(adapters: dict[str, Any], peft_type: str) -> None:
    """Refuses what cannot be folded into a weight.

    Raises:
      UserError: naming the reason.
    """
    for path, adapter in adapters.items():
        if not hasattr(adapter, "merged"):
            raise UserError(
                f"A {peft_type} adapter cannot be merged: what it trained ({path}) is read beside the text, and is no "
                "part of any weight. Export it as an adapter, without --merged."
            )


def bound_of(layout: Layout, dtype: Any) -> float:
    """How far logits of weights rounded to `dtype` may be from those of float32 weights, to the largest logit.

    The formulas are held to TOLERANCE in float32; this is about rounding alone.  It moves a weight by at most half of
    `eps` of itself, and errors of one sign add up over all matrices.  A quarter of the largest logit is another model,
    however it came about.
    """
    eps = float(jnp.finfo(dtype).eps)
    if eps <= jnp.finfo(jnp.float32).eps:
        return TOLERANCE
    return min(eps / 2 * sum(len(site.modules) for site in layout.sites), 0.25)


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """max |Δ| / max |expected|; NaN counts as infinite."""
    worst = float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-30))
    return worst if np.isfinite(worst) else float("inf")


def check_merge(layout: Layout, variables: Tree, logits: Callable[[Tree], np.ndarray], dtype: Any) -> float:
    """Holds the merged model against the adapted one; returns the difference, to the largest logit.

    Args:
      logits: variables to float32 logits of some tokens, computed in float32.

    Raises:
      ExportError: they differ by more than arithmetic explains.
    """
    expected, found = logits(variables), 0.0
    # In float32 the formulas are held to it, in the file's dtype what becomes of them.
    for kind in dict.fromkeys((jnp.dtype(jnp.float32), jnp.dtype(dtype))):
        found, bound = difference(logits(merged_variables(layout, variables, kind)), expected), bound_of(layout, kind)
        if found > bound:
            raise ExportError(
                f"Merged in {kind}, the model's logits differ from the adapter's by {found:.1e} of the largest logit; "
                f"at most {bound:.1e} is rounding. Nothing is written. Export the adapter, or merge in float32."
            )
    return found


def is_untied(layout: Layout, adapters: dict[str, Any]) -> bool:
    """Whether a tied model has two matrices once it is merged."""
    table = adapters.get("embed/table")
    return layout.tied and ("lm_head/table" in adapters or (table is not None and not getattr(table, "ties", False)))


@functools.partial(jax.jit, static_argnames="dtype")
def _merge(adapters: tuple[Any, ...], w: Any, layer: Any, *, dtype: Any) -> Any:
    # A quantised kernel is to be dequantised here, one layer at a time.
    w = (w if layer is None else w[layer]).astype(jnp.float32)
    for adapter in adapters:
        w = (adapter if layer is None else layer_of(adapter, layer)).merged(w)
    return w.astype(dtype)


def save_merged(
    directory: Path,
    base: Base,
    variables: Tree,
    *,
    peft_type: str,
    logits: Callable[[Tree], np.ndarray],
    dtype: Any,
    shard_bytes: int = 4 * 10**9,
    readme: str | None = None,
) -> float:
    """Writes the model with its adapters folded in; returns the difference that `check_merge` found.

    Raises:
      UserError: an adapter that is no part of a weight, or values that are not finite in `dtype`.
      ExportError: as `check_merge`.  CannotCreateError, StorageError: as `replaced_directory`.
    """
    layout, params = base.layout, tree.flatten(variables["params"])
    adapters = from_variables(variables) if "adapters" in variables else {}
    check_mergeable(adapters, peft_type)
    dtype, rows, untied = jnp.dtype(dtype), list(base.rows), is_untied(layout, adapters)
    table = adapters.get("embed/table")
    if untied:
        head = layout.site("lm_head/table")
        rows.append(Row(head.path, ("lm_head.weight",), False, False, head.shape, head.axes))

    def value(row: Row, layer: int) -> np.ndarray:
        over = [table] if row.path == "lm_head/table" and layout.tied and getattr(table, "ties", False) else []
        over += [adapters[row.path]] if row.path in adapters else []
        w = params.get(row.path, params["embed/table"])
        return np.asarray(_merge(tuple(over), w, jnp.int32(layer) if row.stacked else None, dtype=dtype))

    with jax.default_matmul_precision("highest"):  # TPUs and GPUs multiply float32 in fewer bits otherwise
        found = check_merge(layout, variables, logits, dtype)
        write_checkpoint(
            directory, rows, value, base.directory, dtype=dtype, shard_bytes=shard_bytes, untied=untied, readme=readme
        )
    return found
