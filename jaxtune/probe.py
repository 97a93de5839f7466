"""Exports check themselves: a few tokens go through the model as it is in memory, and through what was written.

An export that computes something else is never left behind; an adapter that changes nothing is, with a warning.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune import tree
from jaxtune.data.virtual import NONE
from jaxtune.errors import ExportError
from jaxtune.hf.adapters import PeftAdapter, adapter_tensors, place_adapters, save_adapter
from jaxtune.hf.base import Base
from jaxtune.hf.merge import TOLERANCE, difference
from jaxtune.hosts import whole
from jaxtune.lm import decoder_reads, forward_logits
from jaxtune.peft.method import from_variables, virtual_of
from jaxtune.typing import Tree

ROWS, LENGTH = 2, 24
# Of the largest logit: a float32's own error, which is no change.
NOTHING = 1e-7


def logits_of(base: Base, mesh: Mesh, variables: Tree, peft: PeftAdapter | None) -> Callable[[Tree], np.ndarray]:
    """A function of variables to float32 logits of the same few tokens, whatever dtype the model computes in.

    The tokens are random ones, and those whose own rows `variables` has trained.
    """
    model = base.model.clone(dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(0, base.layout.vocab, (ROWS, LENGTH)).astype(np.int32)
    for path, leaf in tree.flatten(variables).items():
        if path.endswith("indices/fixed"):
            own = np.asarray(leaf)[: LENGTH // 2]
            ids[:, 1 : 1 + len(own)] = own

    virtual = virtual_of(peft.method, base.layout, peft.config) if peft else NONE

    def logits(variables: Tree) -> np.ndarray:
        before = virtual if "prompt" in variables.get("adapters", {}) else NONE
        tasks = [row % max(before.tasks, 1) for row in range(ROWS)]
        tokens, source = np.concatenate([np.stack([before.ids(task) for task in tasks]), ids], axis=1), None
        if base.encodes:  # which reads the same tokens, and the decoder is to say them again
            source = tokens, np.ones_like(tokens)
            tokens = decoder_reads(ids, model.config.start_id, before, tasks)
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            found = forward_logits(model, variables, tokens, np.ones_like(tokens), source)
        return whole(found)[:, -LENGTH:]

    return logits


def write_adapter(
    directory: Path,
    base: Base,
    mesh: Mesh,
    variables: Tree,
    peft: PeftAdapter,
    name: str,
    *,
    readme: str,
    say: Callable[[str], None],
    changes: bool = True,
) -> None:
    """Writes a PEFT directory and reads it back.  Where that gives other parameters than those in memory (ranks doubled
    or left out, an encoder's output), both compute logits.

    Args:
      name: `base_model_name_or_path`.  say: takes a warning.
      changes: whether to compare with the base too, and warn of an adapter that changes nothing.

    Raises:
      UserError: as `save_adapter`.  ExportError: what was written computes something else.
    """
    logits = functools.lru_cache(maxsize=1)(lambda: logits_of(base, mesh, variables, peft))
    params = {"params": variables["params"]}

    def check(again: PeftAdapter) -> None:
        if not identical(from_variables(variables), nn.unbox(again.adapters)):
            found = difference(logits()(params | place_adapters(mesh, again.adapters)), logits()(variables))
            if found > TOLERANCE:
                raise ExportError(
                    f"The adapter that was written gives other logits than the one in memory, by {found:.1e} of the "
                    f"largest ({TOLERANCE:.0e} is rounding). It was removed."
                )
        tensors = adapter_tensors(nn.unbox(again.adapters), base.layout)
        b = {name: value for name, value in tensors.items() if name.endswith("lora_B.weight") and value.size}
        zero = [name for name, value in b.items() if not value.any()]
        if changes and difference(logits()(variables), logits()(params)) <= NOTHING:
            say(
                f"WARNING: the adapter in {directory} does nothing: its logits are the base's own. Was it trained at "
                "all, with a learning rate above zero?"
            )
        elif zero:
            say(f"WARNING: {len(zero)} of {len(b)} lora_B in {directory} are zero and do nothing, {zero[0]} first.")

    save_adapter(directory, variables, base.layout, peft, name, readme=readme, check=check)


def identical(a: Any, b: Any) -> bool:
    """Whether two sets of adapters are the same to the last bit, settings included, and so compute the same."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
