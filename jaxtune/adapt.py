"""What trains: the `peft` section and a loaded base to trainable and frozen leaves, each on its device.

    variables = {params: the base, adapters: the method's}      by path: trainable | frozen

With `full` every parameter is on the trainable side and there is no adapter.
"""

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import mesh as meshes
from jaxtune import tree
from jaxtune.errors import UserError, did_you_mean
from jaxtune.hf.adapters import PeftAdapter, load_adapter, place_adapters, save_adapter
from jaxtune.hf.base import Base, load_base
from jaxtune.hf.weights import save_params
from jaxtune.peft import METHODS, saved
from jaxtune.peft.method import Start, is_trainable, read_config, to_variables
from jaxtune.typing import Tree


class Adapted(NamedTuple):
    """structure: of the variables, for `tree.unflatten`.  trainable, frozen: {path: array}.  peft: None if `full`."""

    structure: Tree
    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    peft: PeftAdapter | None

    def variables(self, trainable: dict[str, jax.Array]) -> Tree:
        return tree.unflatten(self.structure, self.frozen | trainable)


def read_method(section: dict[str, Any]) -> tuple[Any, Any]:
    """(method module, its config) of a `peft` section as plain values; (None, None) for `full`.

    Raises:
      UserError: an unknown method, or a value that the method refuses.
    """
    name = section["method"]
    if name == "full":
        return None, None
    if name not in METHODS:
        known = [*METHODS, "full"]
        raise UserError(f"`peft.method` is {name!r}. It can be: {', '.join(known)}.{did_you_mean(name, known)}")
    values = {k: v for k, v in section.items() if k not in ("method", "init_from") and v is not None}
    for pattern in ("rank_pattern", "alpha_pattern"):
        if isinstance(values.get(pattern), list):
            values[pattern] = dict(values[pattern])
    method = METHODS[name]
    return method, read_config(method.Config, values, method.NEUTRAL, "`config.peft`")


def check_targets(section: dict[str, Any], base: Base) -> None:
    """Refuses targets that match nothing, or an adapter that does not fit, before a weight is read."""
    method, config = read_method(section)
    if section["init_from"]:
        load_first(section, base)
    elif method is not None:
        method.plan(base.layout, config)
        saved.choose(base.sites, config.modules_to_save)


def load_first(section: dict[str, Any], base: Base) -> PeftAdapter:
    """The adapter that training starts from; its own settings stand, whatever the section's others say.

    Raises:
      MissingInputError, UserError: as `load_adapter`; or another method is asked for.
    """
    if section["method"] == "full":
        raise UserError("`peft.init_from` names an adapter, and `peft.method` is full. Give the model as `model.id`.")
    peft = load_adapter(Path(section["init_from"]).expanduser(), base.layout)
    if peft.method is not METHODS[section["method"]]:
        raise UserError(
            f"`peft.init_from` {section['init_from']} is of type {peft.method.PEFT_TYPE}, and `peft.method` is "
            f"{section['method']}. Set the one that the adapter has."
        )
    return peft


def fresh_adapters(method: Any, config: Any, base: Base, mesh: Mesh, params: Tree, seed: int) -> Tree:
    """The method's initial adapters, each made where its weight's axes say, never whole on one device."""

    def init(key: jax.Array, flat: dict[str, jax.Array]) -> Tree:
        start = Start(flat)
        whole = saved.init(saved.choose(base.sites, config.modules_to_save), start)
        return to_variables(method.init(key, base.layout, config, start) | whole)

    key, flat = jax.random.key(seed), tree.flatten(params)
    where = meshes.shardings(mesh, jax.eval_shape(init, key, flat))
    return jax.jit(lambda key, flat: nn.unbox(init(key, flat)), out_shardings=where)(key, flat)


def adapt(section: dict[str, Any], base: Base, mesh: Mesh, *, dtype: str, seed: int) -> Adapted:
    """Loads the base and lays the method's adapters over it.

    Args:
      section: `config.peft` as plain values.  dtype: of the frozen base.  seed: of the initial adapters.

    Raises:
      UserError: a target that matches nothing, a checkpoint or an adapter that does not fit.
    """
    method, config = read_method(section)
    # What trains is float32, whatever the activations are: small updates would be lost in bfloat16.
    params = load_base(base, mesh, lambda path: jnp.float32 if method is None else jnp.dtype(dtype))
    variables, peft = {"params": params}, None
    if section["init_from"]:
        peft = load_first(section, base)
        variables |= place_adapters(mesh, peft.adapters)
    elif method is not None:
        peft = PeftAdapter(method, config, {}, None)
        variables |= fresh_adapters(method, config, base, mesh, params, seed)
    leaves = tree.flatten(variables)
    trained = {p for p in leaves if peft is None or (p.startswith("adapters/") and is_trainable(p))}
    return Adapted(
        jax.tree.map(lambda _: 0, variables),
        {path: leaf for path, leaf in leaves.items() if path in trained},
        {path: leaf for path, leaf in leaves.items() if path not in trained},
        peft,
    )


def export(workdir: Path, base_name: str, base: Base, adapted: Adapted, trainable: dict[str, jax.Array]) -> Path:
    """Writes what was trained: `adapter/` (a PEFT directory), or `model/` (a Hugging Face checkpoint) for `full`."""
    variables = adapted.variables(trainable)
    if adapted.peft is None:
        save_params(workdir / "model", base.rows, variables["params"], base.directory, dtype=base.model.dtype)
        return workdir / "model"
    prefix = base.text_prefix
    save_adapter(workdir / "adapter", variables, base.layout, adapted.peft, base_name, text_prefix=prefix)
    return workdir / "adapter"


def how_to_load(where: Path, base: Base, adapted: Adapted) -> str:
    """What to type to use the result in transformers and peft."""
    dtype = str(jnp.dtype(base.model.dtype))
    if adapted.peft is None:
        return (
            f"The model is in {where}. To load it:\n"
            f"  model = transformers.AutoModelForCausalLM.from_pretrained({str(where)!r}, dtype={dtype!r})"
        )
    return (
        f"The PEFT adapter is in {where}. To load it:\n"
        f"  base = transformers.AutoModelForCausalLM.from_pretrained({str(base.directory)!r}, dtype={dtype!r})\n"
        f"  model = peft.PeftModel.from_pretrained(base, {str(where)!r})"
    )
