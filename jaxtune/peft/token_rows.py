"""`trainable_token_indices`: a few rows of the embedding trained whole, e.g. of new special tokens.

Equals peft's `TrainableTokensLayer`.  What it stores under the name `trainable_tokens_delta` are the rows themselves,
not differences.  On a tied model the head has the same rows.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.errors import UserError
from jaxtune.layers import take_rows
from jaxtune.peft.method import Fixed, Layout, Site, Start, box, is_saved, take

SUFFIX = "token_adapter.trainable_tokens_delta"


@struct.dataclass
class TokenRows:
    """rows [n, D] stand in for those of the token ids, `indices` [n]."""

    rows: Any
    indices: Fixed
    ties = True  # a tied head has them too
    targeted = False  # by `target_modules`

    def embed(self, table, tokens):
        x = take_rows(table, tokens).astype(jnp.float32)
        hit = tokens[..., None] == self.indices.value[None, None]
        rows = jnp.einsum("BTN,ND->BTD", hit.astype(jnp.float32), self.rows, precision="highest")
        return jnp.where(jnp.any(hit, axis=-1, keepdims=True), rows, x)

    def weight(self, w):
        """For a tied head: a copy of it, since rows cannot be exchanged in a frozen array."""
        return self.merged(w.astype(w.dtype))

    def merged(self, w):
        return w.at[self.indices.value].set(self.rows.astype(w.dtype))

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        return {SUFFIX: np.asarray(self.rows)}


def check(indices: Any) -> None:
    """Refuses what is no list of token ids, nor {module: list}.

    Raises:
      ValueError: naming the key.
    """
    for ids in indices.values() if isinstance(indices, Mapping) else [indices or [0]]:
        good = isinstance(ids, Sequence) and not isinstance(ids, str) and len(set(ids)) == len(ids) > 0
        if not good or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise ValueError(
                f"trainable_token_indices is {indices!r}. It is a list of different token ids, or one by module: "
                '{"embed_tokens": [4, 5]}.'
            )


def ids_of(indices: Any) -> list[int]:
    """The ids; a mapping has one entry, as `plan` checked."""
    return list(next(iter(indices.values())) if isinstance(indices, Mapping) else indices)


def plan(layout: Layout, indices: Any, adapted: Mapping[str, Any], modules_to_save: Any) -> None:
    """Refuses indices that the embedding cannot take.

    Raises:
      UserError: an id beyond the vocabulary; another module than the embedding; one adapted or saved besides.
    """
    if not indices:
        return
    site = layout.site("embed/table")
    (module,) = site.modules
    if isinstance(indices, Mapping) and (len(indices) > 1 or not module.endswith(next(iter(indices)))):
        raise UserError(
            f"trainable_token_indices names {', '.join(indices)}. jaxtune trains rows of {module} (and of a head that "
            "is tied to it): give their ids as a list."
        )
    if site.path in adapted or is_saved(modules_to_save, module):
        raise UserError(f"trainable_token_indices and another key both train {module}. Choose one.")
    if site.kind == "shared" and not layout.tied:
        raise UserError(
            f"trainable_token_indices: this model's head is not tied to {module}, and PEFT (over transformers 5, which "
            "takes every T5 for tied) would put the embedding's rows into the head, too. Take peft.method=partial with "
            f"target_modules [{module!r}]."
        )
    if max(ids_of(indices)) >= layout.vocab:
        raise UserError(
            f"trainable_token_indices has the id {max(ids_of(indices))}; the vocabulary has {layout.vocab}."
        )


def init(layout: Layout, indices: Any, start: Start) -> dict[str, TokenRows]:
    """The base's own rows, in float32."""
    if not indices:
        return {}
    ids = jnp.asarray(np.array(ids_of(indices), np.int32))
    return {"embed/table": _boxed(take_rows(start.table(), ids).astype(jnp.float32), ids)}


def from_peft(layout: Layout, indices: Any, tensors: MutableMapping[str, np.ndarray]) -> dict[str, TokenRows]:
    """The rows of a PEFT file.

    Raises:
      KeyError, UserError: as `method.take`.
    """
    if not indices:
        return {}
    ids, (module,) = np.array(ids_of(indices), np.int32), layout.site("embed/table").modules
    rows = take(tensors, f"{module}.{SUFFIX}", (len(ids), layout.width), f"{len(ids)} token ids")
    return {"embed/table": _boxed(rows, ids)}


def _boxed(rows: Any, ids: Any) -> TokenRows:
    return TokenRows(box(rows, None, "embed"), Fixed(jnp.asarray(ids)))
