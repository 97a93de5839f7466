"""`modules_to_save`: a module trained whole, as a copy beside the frozen original.

With tied embeddings a copy of `embed_tokens` does not reach the output head nor the other way round, as in PEFT.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.errors import UserError
from jaxtune.layers import matmul
from jaxtune.peft.method import Site, Start, check_reached, is_saved, require_match


@struct.dataclass
class Saved:
    """value: the weight that stands in for the base's, with its layer axis where it has one."""

    value: Any
    targeted = False  # by `target_modules`

    def linear(self, x, y, w, rng):
        return matmul(x, self.value)

    def weight(self, w):
        return self.value

    def embed(self, table, tokens):
        return jnp.take(self.value, tokens, axis=0, mode="clip")

    def merged(self, w):
        return self.value

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        """The tensor of one layer by PEFT's suffix."""
        value = np.asarray(self.value[layer] if site.stacked else self.value)
        return {"weight": value.T if site.kind == "linear" else value}


def choose(sites: Sequence[Site], modules_to_save: Sequence[str] | None) -> list[Site]:
    """The sites trained whole.

    Raises:
      UserError: a name that matches nothing, or only some layers of a stacked parameter.
    """
    chosen = []
    for name in modules_to_save or ():
        found = [s for s in sites if any(is_saved([name], m) for m in s.modules)]
        require_match(found, "modules_to_save", [name], sites)
        chosen += [s for s in found if s not in chosen]
    for site in chosen:
        check_reached(site, "modules_to_save")
        hit = [m for m in site.modules if is_saved(modules_to_save, m)]
        if len(hit) != len(site.modules):
            raise UserError(
                f"modules_to_save matches {len(hit)} of the {len(site.modules)} layers of {site.path} ({hit[0]}, …). "
                "jaxtune trains a module whole in all layers or in none: name it without the layer."
            )
    return chosen


def init(sites: Sequence[Site], start: Start) -> dict[str, Saved]:
    """Copies of the base weights, in float32; a tied head's is the embedding's."""
    copies = {}
    for site in sites:
        source = start.params[site.path] if site.path in start.params else start.table()
        value = source.astype(jnp.float32)
        copies[site.path] = Saved(nn.LogicallyPartitioned(value, site.axes))
    return copies


def from_peft(site: Site, tensors: MutableMapping[str, np.ndarray]) -> Saved:
    """One site's weight from PEFT's tensors, which are taken out by module name.

    Raises:
      KeyError: a tensor is missing.  UserError: one has not the site's shape.
    """
    shape = site.shape[1:] if site.stacked else site.shape
    values = []
    for module in site.modules:
        value = tensors.pop(f"{module}.weight")
        value = value.T if site.kind == "linear" else value
        if value.shape != shape:
            raise UserError(
                f"The adapter's {module}.weight has shape {list(value.shape)}; the model's is {list(shape)}."
            )
        values.append(value)
    return Saved(nn.LogicallyPartitioned(np.stack(values) if site.stacked else values[0], site.axes))
