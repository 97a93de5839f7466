"""What trains: the `peft` section and a loaded base to trainable and frozen leaves, each on its device.

    variables = {params: the base, adapters: the method's}      by path: trainable | frozen

With `full` and `partial` parameters are on the trainable side and there is no adapter.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxtune import mesh as meshes
from jaxtune import tree
from jaxtune.config import get_default
from jaxtune.data.virtual import Virtual
from jaxtune.defaults import LEARNING_RATES
from jaxtune.errors import UserError, did_you_mean
from jaxtune.hf.adapters import PeftAdapter, load_adapter, place_adapters
from jaxtune.hf.base import Base, load_base, lost_by_rounding
from jaxtune.hf.handover import differences, others
from jaxtune.peft import METHODS, partial, saved
from jaxtune.peft.keys import read_config
from jaxtune.peft.method import Start, is_trainable, to_variables, virtual_of
from jaxtune.quant import Quantised
from jaxtune.typing import Tree

OWN = ("method", "init_from")  # keys of the section that are not a method's


class Adapted(NamedTuple):
    """structure: of the variables, for `tree.unflatten`.  trainable, frozen: {path: array}.  peft: None where the base
    itself trains, and then layers: {parameter path: whether each layer does}."""

    structure: Tree
    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    peft: PeftAdapter | None
    layers: dict[str, tuple[bool, ...]]

    def variables(self, trainable: dict[str, jax.Array]) -> Tree:
        return tree.unflatten(self.structure, self.frozen | trainable)

    def optimiser(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
        """The configured optimiser, with what the method does around it."""
        if self.peft is None:
            return partial.optimiser(inner, {f"params/{path}": which for path, which in self.layers.items()})
        wrap = getattr(self.peft.method, "optimiser", None)
        return wrap(inner, self.peft.config, self.frozen) if wrap else inner

    def penalty(self) -> Callable[..., Any] | None:
        """(trainable, frozen) to what the method adds to the loss."""
        found = getattr(self.peft.method, "penalty", None) if self.peft else None
        return functools.partial(found, self.peft.config) if self.peft and found else None


def settings_of(name: str) -> list[str]:
    """The keys of the `peft` section that a method has: all of its config but the sizes of the model.

    Raises:
      UserError: an unknown method.
    """
    if name not in LEARNING_RATES:
        known = list(LEARNING_RATES)
        raise UserError(f"`peft.method` is {name!r}. It can be: {', '.join(known)}.{did_you_mean(name, known)}")
    if name == "full":
        return []
    config_class = METHODS[name].Config if name in METHODS else partial.Config
    usual: Any = get_default()
    return [f.name for f in dataclasses.fields(config_class) if f.name in usual.peft]


def read_method(section: dict[str, Any]) -> tuple[Any, Any]:
    """(method module, its config) of a `peft` section as plain values; the module is None for `full` and `partial`.

    Raises:
      UserError: an unknown method, a key that it does not have, or a value that it refuses.
    """
    name = section["method"]
    fields = settings_of(name)
    values = {k: v for k, v in section.items() if k not in OWN and v is not None}
    for pattern in ("rank_pattern", "alpha_pattern"):
        if isinstance(values.get(pattern), list):
            values[pattern] = dict(values[pattern])
    method = METHODS.get(name)
    config_class = method.Config if method else partial.Config
    for key in values:
        if key not in fields:
            raise UserError(
                f"`peft.{key}` is set, and {name} has no such key.{did_you_mean(key, fields)} "
                f"It has: {', '.join(fields) or 'none; it trains everything'}."
            )
    if name == "partial" and "target_modules" not in values and "exclude_modules" not in values:
        raise UserError(
            "`peft.method` is partial. Name the modules that train in `peft.target_modules`, e.g. "
            "('embed_tokens','lm_head'); or take full."
        )
    return method, read_config(config_class, values, method.NEUTRAL if method else {}, "`config.peft`")


def learning_rate(section: dict[str, Any]) -> float:
    """What the method trains well with, where the config names none."""
    read_method(section)
    return LEARNING_RATES[section["method"]]


def check_targets(section: dict[str, Any], base: Base) -> None:
    """Refuses targets that match nothing, or an adapter that does not fit, before a weight is read."""
    method, config = read_method(section)
    if section["init_from"]:
        load_first(section, base)
    elif method is None:
        partial.plan(base.layout, config)
    else:
        method.plan(base.layout, config)
        saved.choose(base.sites, config.modules_to_save)


def load_first(section: dict[str, Any], base: Base) -> PeftAdapter:
    """The adapter that training starts from; its own settings stand, whatever the section's others say.

    Raises:
      MissingInputError, UserError: as `load_adapter`; or another method is asked for.
    """
    if section["method"] not in METHODS:
        raise UserError(
            f"`peft.init_from` names an adapter, and `peft.method` is {section['method']}. Give the model as "
            "`model.id`."
        )
    ours = {"soft_prompt_scale": section.get("soft_prompt_scale")}
    peft = load_adapter(Path(section["init_from"]).expanduser(), base.layout, **ours)
    stored = next(name for name, method in METHODS.items() if method is peft.method)
    # The file of an encoder's output has no encoder.
    name, config = peft.method.continues_as(peft.config) if hasattr(peft.method, "continues_as") else (stored, None)
    if name != section["method"]:
        raise UserError(
            f"`peft.init_from` {section['init_from']} is of type {peft.method.PEFT_TYPE}, and `peft.method` is "
            f"{section['method']}. Set it to {name}"
            + ("." if name == stored else f", as which it trains on: the file holds no more than {name} needs.")
        )
    return peft._replace(method=METHODS[name], config=config or peft.config)


def handed_over(section: dict[str, Any], base: Base) -> list[str]:
    """In what the adapter that training starts from was made for something else than this config: a line each."""
    if not section["init_from"]:
        return []
    peft = load_first(section, base)
    lines = differences(peft.trained_over, base.as_trained_over())
    method, asked = read_method(section)
    if method is None or method is not peft.method:
        return lines
    names = [
        {module.rsplit(".", 1)[-1] for path in method.plan(base.layout, c) for module in modules_at(base, path)}
        for c in (peft.config, asked if section["target_modules"] is not None else peft.config)
    ]
    given = {key: getattr(asked, key) for key in settings_of(section["method"]) if section[key] is not None}
    return lines + others(peft.config, given, *names)


def modules_at(base: Base, path: str) -> tuple[str, ...]:
    """PEFT's modules of a parameter; none of a prompt's."""
    return next((site.modules for site in base.sites if site.path == path), ())


def virtual_tokens(section: dict[str, Any], base: Base) -> Virtual:
    """What the data puts before each row."""
    method, config = read_method(section)
    if section["init_from"]:
        peft = load_first(section, base)
        method, config = peft.method, peft.config
    return virtual_of(method, base.layout, config)


def fresh_adapters(
    method: Any,
    config: Any,
    base: Base,
    mesh: Mesh,
    params: Tree,
    *,
    dtype: Any,
    seed: int,
    encode: Callable[[str], Sequence[int]],
) -> dict[str, Tree]:
    """The method's initial adapters, each made where its weight's axes say, never whole on one device."""
    flat = tree.flatten(params, is_leaf=lambda x: isinstance(x, Quantised))
    lost = lost_by_rounding(base, mesh, flat, wanted_of_rounding(method, config, base), dtype)
    init = initial(method, config, base, encode)
    key = jax.random.key(seed)
    where = meshes.shardings(mesh, jax.eval_shape(init, key, flat, lost))
    return jax.jit(lambda *given: nn.unbox(init(*given)), out_shardings=where)(key, flat, lost)


def wanted_of_rounding(method: Any, config: Any, base: Base) -> dict[str, int]:
    """{path: rank} of what the method's start needs of what quantisation lost."""
    return method.lost(base.layout, config) if hasattr(method, "lost") else {}


def initial(method: Any, config: Any, base: Base, encode: Callable[[str], Sequence[int]]) -> Callable[..., Any]:
    """The function of (key, {path: parameter}, what rounding lost) to the method's first variables, boxed."""

    def init(key: jax.Array, flat: dict[str, jax.Array], lost: Tree) -> dict[str, Tree]:
        start = Start(flat, encode, lost)
        whole = saved.init(saved.choose(base.sites, config.modules_to_save), start)
        return to_variables(method.init(key, base.layout, config, start) | whole)

    return init


def adapt(
    section: dict[str, Any],
    base: Base,
    mesh: Mesh,
    *,
    dtype: str,
    seed: int,
    total_steps: int,
    encode: Callable[[str], Sequence[int]],
    params: Tree | None = None,
) -> Adapted:
    """Loads the base and lays the method's adapters over it.

    Args:
      section: `config.peft` as plain values.  dtype: of the frozen base.  seed: of the initial adapters.
      total_steps: of the run, for schedules of ranks.  encode: text to ids, for prompts that start from a text.
      params: the base's, where they are loaded already (not with `full` and `partial`).

    Raises:
      UserError: a target that matches nothing, a checkpoint or an adapter that does not fit.
    """
    method, config = read_method(section)
    layers = partial.plan(base.layout, config) if method is None else {}
    # What trains is float32, whatever the activations are: small updates would be lost in bfloat16.
    if params is None:
        params = load_base(base, mesh, lambda path: jnp.float32 if path in layers else jnp.dtype(dtype), layers)
    variables, peft = {"params": params}, None
    if section["init_from"]:
        peft = load_first(section, base)
        peft = peft._replace(config=with_steps(peft.config, total_steps))
        variables |= place_adapters(mesh, peft.adapters)
    elif method is not None:
        config = with_steps(config, total_steps)
        peft = PeftAdapter(method, config, {}, None)
        variables |= fresh_adapters(
            method, config, base, mesh, params, dtype=jnp.dtype(dtype), seed=seed, encode=encode
        )
    return divided(variables, peft, layers)


def divided(variables: Tree, peft: PeftAdapter | None, layers: dict[str, tuple[bool, ...]]) -> Adapted:
    """The leaves of the variables, arrays or their shapes, on the sides that they belong to."""
    leaves = tree.flatten(variables)

    def trains(path: str) -> bool:
        collection, _, inner = path.partition("/")
        return inner in layers if collection == "params" else collection == "adapters" and is_trainable(path)

    return Adapted(
        jax.tree.map(lambda _: 0, variables),
        {path: leaf for path, leaf in leaves.items() if trains(path)},
        {path: leaf for path, leaf in leaves.items() if not trains(path)},
        peft,
        layers,
    )


def with_steps(config: Any, total_steps: int) -> Any:
    """A schedule of ranks ends with the run unless it says otherwise.

    Raises:
      UserError: the run is too short for it.
    """
    if getattr(config, "total_step", 0) is not None:
        return config
    try:
        return dataclasses.replace(config, total_step=total_steps)
    except ValueError as error:
        raise UserError(f"`config.peft`: {error}") from None
