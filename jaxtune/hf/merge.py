"""Adapters folded into the weights that they adapt, written as a Hugging Face checkpoint.

First the model is run both ways, with its adapters and with every weight as the file will have it: what differs is
never written.  Then one tensor after the other is merged on the devices and goes to its shard; neither the devices nor
the host ever hold a merged copy of the model.

On a tied model an adapter of the embedding does not reach the head, nor the other way round, so that the merged model
has two matrices and `tie_word_embeddings` is false; trained token rows are the head's too, and leave it tied.  (peft's
`merge_and_unload` adds an embedding's LoRA to both.)

Over a quantised base there are two weights to fold into: the dequantised one, with which the model is what was trained,
and the original, which is nearer to the base that was published.  Neither is right for all, so that one is asked for.
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
from jaxtune.errors import ExportError, UserError, did_you_mean
from jaxtune.hf import bnb
from jaxtune.hf.base import Base
from jaxtune.hf.rows import Row
from jaxtune.hf.weights import read_part, stored_tensors, write_checkpoint
from jaxtune.layers import matmul
from jaxtune.peft.method import Layout, from_variables, layer_of, to_variables
from jaxtune.quant import Quantised
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


@functools.partial(jax.jit, static_argnames=("dtype", "factor"))
def _merge(adapters: tuple[Any, ...], w: Any, layer: Any, *, dtype: Any, factor: float = 1.0) -> Any:
    """One layer of a weight with stacked adapters, or a weight that has no layers; times `factor`."""
    w = w.astype(jnp.float32)
    for adapter in adapters:
        w = (adapter if layer is None else layer_of(adapter, layer)).merged(w)
    return (w if factor == 1 else w * factor).astype(dtype)


ONTO = ("dequantised", "original")
SAY_ONTO = (
    "Say what the adapter is folded into: --onto dequantised (what comes out is what was trained) or --onto original "
    "(the weights as they were before: nearer to the published base, but the adapter was trained over the others)."
)


def originals(base: Base, onto: str | None) -> Callable[[Row, int], np.ndarray] | None:
    """How to read the original of a quantised weight (of a row and a layer, without layer axis), or None where what it
    was rounded to is meant, or where nothing is quantised.

    Raises:
      UserError: one of the two must be asked for, or there are no originals.
    """
    if onto not in (None, *ONTO):
        raise UserError(f"--onto is {onto!r}. It can be: {', '.join(ONTO)}.{did_you_mean(onto, ONTO)}")
    if base.quant is None:
        if onto == "dequantised":
            raise UserError("onto=dequantised is for a quantised base, and this one is not.")
        return None
    if onto is None:
        raise UserError(f"The base is quantised ({base.quant}). {SAY_ONTO}")
    if onto == "dequantised":
        return None
    if bnb.scheme_in(base.hf_config):
        raise UserError(f"{base.directory} is stored quantised and has no originals. Take --onto dequantised.")
    stored = stored_tensors(base.directory)

    def read(row: Row, layer: int) -> np.ndarray:
        whole = [slice(None)] * (len(row.shape) - row.stacked)
        part = read_part(row, stored, (slice(layer, layer + 1), *whole) if row.stacked else tuple(whole), np.float32)
        return part[0] if row.stacked else part

    return read


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
    onto: str | None = None,
) -> float:
    """Writes the model with its adapters folded in; returns the difference that `check_merge` found, which over a
    quantised base is that of dequantised weights.

    Args:
      onto: dequantised | original, of a quantised base.

    Raises:
      UserError: an adapter that is no part of a weight, values that are not finite in `dtype`, or as `originals`.
      ExportError: as `check_merge`.  CannotCreateError, StorageError: as `replaced_directory`.
    """
    original = originals(base, onto)
    layout, params = base.layout, tree.flatten(variables["params"], is_leaf=lambda x: isinstance(x, Quantised))
    adapters = from_variables(variables) if "adapters" in variables else {}
    check_mergeable(adapters, peft_type)
    dtype, rows, head_factor = jnp.dtype(dtype), list(base.rows), 1.0
    untied, changes = is_untied(layout, adapters), base.as_written
    table = adapters.get("embed/table")
    if base.encodes:
        # Transformers 4 knows a T5 that is tied and scales the decoder's output, and one that does neither.
        scaled = base.model.config.scaled
        untied |= layout.tied and not scaled
        head_factor = layout.width**-0.5 if scaled and (untied or not layout.tied) else 1.0
        changes = dict.fromkeys(changes, layout.tied and not untied)
    elif untied:
        changes = {"tie_word_embeddings": False}
    if untied:
        head = layout.site("lm_head/table")
        rows.append(Row(head.path, ("lm_head.weight",), False, False, head.shape, head.axes))

    def value(row: Row, layer: int) -> np.ndarray:
        over = [table] if row.path == "lm_head/table" and layout.tied and getattr(table, "ties", False) else []
        over += [adapters[row.path]] if row.path in adapters else []
        source = row if row.path in params else next(r for r in rows if r.path == "embed/table")
        w = params[source.path]
        if original and isinstance(w, Quantised):
            w = original(source, layer)
        elif row.stacked:
            w = jax.tree.map(lambda x: x[layer], w)
        factor = head_factor if row.path == "lm_head/table" else 1.0
        return np.asarray(_merge(tuple(over), w, jnp.int32(layer) if row.stacked else None, dtype=dtype, factor=factor))

    with jax.default_matmul_precision("highest"):  # TPUs and GPUs multiply float32 in fewer bits otherwise
        found = check_merge(layout, variables, logits, dtype)
        write_checkpoint(
            directory, rows, value, base.directory, dtype=dtype, shard_bytes=shard_bytes, changes=changes, readme=readme
        )
    return found
