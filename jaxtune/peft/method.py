"""What every method is made of: sites, PEFT's matching rules, values that do not train, and strict config keys.

A method is one file with these names:

  PEFT_TYPE        PEFT's word for it
  LEARNING_RATE    what it trains well with, where the config names none
  Config           a frozen dataclass of PEFT's own keys; NEUTRAL: PEFT's other keys and the values that mean "not used"
  plan(layout, config)                what gets an adapter, by parameter path; refuses what matches nothing
  init(key, layout, config, start)    {path: adapter}, fresh
  from_peft(layout, config, tensors)  {path: adapter} of a PEFT file, whose tensors are taken out as they are used
  to_config(layout, config, adapters) the keys that adapter_config.json gets

and a class of adapter.  An adapter is a pytree at the path of the parameter it adapts, boxed with its weight's logical
axes and stacked over layers as that is.  Inside the layer scan it has one layer's part of every array.

  linear(x, y, w, rng)    at a kernel: the new y [N, O] from x [N, I], y = x W and W [I, O]
  weight(w)               at a norm or a head: the new weight
  embed(table, tokens)    at the embedding: the rows of these tokens, before scaling
  merged(w)               the weight that does the same without an adapter; w float32
  to_peft(site, layer)    {PEFT's suffix: tensor} of one layer; empty where that layer has none

What all layers of a site have in common is the adapter's field `shared`, without a layer axis: a `Fixed`, or None.

Prompts and prefixes belong to no weight; they lie at the paths `prompt` and `prefix` (jaxtune.peft.prompt).
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jaxtune import tree
from jaxtune.errors import UserError, did_you_mean
from jaxtune.typing import Tree


class Site(NamedTuple):
    """A parameter an adapter can be put on.

    path: `layers/attn/q/kernel`; modules: PEFT's module paths, one per layer; shape and axes: with the layer axis.
    """

    path: str
    modules: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kind: str  # linear | embedding | head | norm

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"


class Layout(NamedTuple):
    """What a method may know of a model.

    family: gemma | gemma2 | gemma3 | …, for PEFT's defaults.  embed_scale: what rows of the embedding are multiplied
    with.  tied: the output head is the embedding.  The sizes are those of the text decoder.
    """

    family: str
    sites: tuple[Site, ...]
    tied: bool
    embed_scale: float
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def site(self, path: str) -> Site:
        return next(s for s in self.sites if s.path == path)


class Start(NamedTuple):
    """What initial values may be drawn from.  params: {path: the base's values}.  encode: text to token ids."""

    params: Mapping[str, Any]
    encode: Callable[[str], Sequence[int]] | None = None

    def table(self) -> Any:
        return self.params["embed/table"]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Fixed:
    """An array inside an adapter that is data, not a parameter: it has no gradient and no optimiser state."""

    value: Any

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("fixed"), self.value),), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def is_trainable(path: str) -> bool:
    """Whether a leaf of the adapters, by its path, is trained."""
    return not path.endswith("/fixed")


def box(value: Any, *axes: str | None) -> Any:
    """An array with its logical axes."""
    return nn.LogicallyPartitioned(value, axes)


def to_variables(adapters: Mapping[str, Any]) -> dict[str, Tree]:
    """{path: adapter} as the collections that a model reads: `adapters`, which its layer scan takes apart, and
    `shared`, which goes to every layer whole."""
    shared = {path: a.shared for path, a in adapters.items() if getattr(a, "shared", None) is not None}
    own = {path: a.replace(shared=None) if path in shared else a for path, a in adapters.items()}
    return {"adapters": tree.nest(own)} | ({"shared": tree.nest(shared)} if shared else {})


def from_variables(variables: Mapping[str, Tree]) -> dict[str, Any]:
    """The adapters by path again."""
    own = tree.flatten(variables["adapters"], is_leaf=lambda x: hasattr(x, "to_peft"))
    shared = tree.flatten(variables.get("shared", {}), is_leaf=lambda x: isinstance(x, Fixed))
    return {path: a.replace(shared=shared[path]) if path in shared else a for path, a in own.items()}


def site_key(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for each path, whatever else is adapted."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def layer_of(adapter: Any, layer: int) -> Any:
    """One layer's part of a stacked adapter, as the layer scan hands it to the doors."""
    return jax.tree.map(lambda x: x[layer], adapter)


def take(tensors: MutableMapping[str, np.ndarray], name: str, shape: Sequence[int], why: str = "") -> np.ndarray:
    """Takes a PEFT tensor out of the mapping.

    Raises:
      KeyError: it is missing.  UserError: it has another shape.
    """
    tensor = tensors.pop(name)
    if tensor.shape != tuple(shape):
        raise UserError(
            f"The adapter's {name} has shape {list(tensor.shape)}; {why or 'its config'} on this model needs "
            f"{list(shape)}."
        )
    return tensor


# ---------------------------------------------------------------- which modules (peft/tuners/tuners_utils.py)

# PEFT's default targets of most methods, by family where it is not q_proj and v_proj
# (TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING).
QUERY_VALUE = {"": ("q_proj", "v_proj"), "t5": ("q", "v")}


def targets_of(layout: Layout, config: Any, default: Mapping[str, Sequence[str]]) -> Any:
    """`target_modules`, or the family's default; `default` has "" for families that it does not name."""
    return config.target_modules if config.target_modules is not None else default.get(layout.family, default[""])


def select(
    layout: Layout, config: Any, default: Mapping[str, Sequence[str]], kinds: Sequence[str] = ("linear",)
) -> dict[str, tuple[bool, ...]]:
    """{path: whether each layer has an adapter} of `target_modules`, less what is excluded or saved whole.

    Raises:
      UserError: nothing matches, a name matches nothing, or a module of a kind that the method cannot adapt does.
    """
    targets = targets_of(layout, config, default)
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    excluded = getattr(config, "exclude_modules", None)
    layers = getattr(config, "layers_to_transform", None)
    layers = {layers} if isinstance(layers, int) else set(layers or ())

    def adapted(site: Site, module: str) -> bool:
        if excluded and names_match(excluded, module):
            return False
        if is_saved(config.modules_to_save, module):
            return False
        if layers and layer_index(module, config.layers_pattern) not in layers:
            return False
        return site.kind == "linear" if all_linear else names_match(targets, module)

    chosen = {site.path: tuple(adapted(site, module) for module in site.modules) for site in layout.sites}
    found = {path: layers for path, layers in chosen.items() if any(layers)}
    require_match(list(found), "target_modules", targets, layout.sites)
    for site in layout.sites:
        if site.path in found and site.kind not in kinds:
            raise UserError(
                f"target_modules {targets!r} matches {site.modules[0]}, of kind {site.kind}. This method adapts: "
                f"{', '.join(kinds)}. Name that module in `modules_to_save` to train it whole."
            )
    if not isinstance(targets, str):
        # PEFT lets a name in a list match nothing as long as another does; a misspelt name would go unnoticed.
        modules = [module for site in layout.sites for module in site.modules]
        for name in targets:
            require_match([m for m in modules if names_match([name], m)], "target_modules", [name], layout.sites)
    return found


def spellings(module: str) -> tuple[str, ...]:
    """A module path as text-only and as multimodal checkpoints have it (before and since transformers 4.52), since an
    adapter made on one fits the text tower of the other."""
    if not module.startswith("model."):
        return (module,)
    return (module, module.replace("model.", "model.language_model.", 1), "language_model." + module)


def names_match(names: Any, module: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds names or their dotted ends."""
    if isinstance(names, str):
        return any(re.fullmatch(names, spelling) for spelling in spellings(module))
    return any(s == name or s.endswith("." + name) for name in names for s in spellings(module))


def layer_index(module: str, layers_pattern: Any = None) -> int | None:
    """The first integer component of a module path, optionally only right after a given name."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)
        return int(found["index"]) if found else None
    for pattern in patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module)
        if found:
            return int(found["index"])
    return None


def pattern_value(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key, in order, that matches the end of the module path (PEFT's `get_pattern_key`)."""
    for key, value in pattern.items():
        if any(re.match(rf"(.*\.)?({key})$", spelling) for spelling in spellings(module)):
            return value
    return default


def is_saved(modules_to_save: Sequence[str] | None, module: str) -> bool:
    """Whether a module, or one that contains it, is trained whole: PEFT compares the ends of paths."""
    parts = module.split(".")
    ancestors = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(a.endswith(name) for a in ancestors for name in modules_to_save or ())


def require_match(found: Sequence[Any], asked_by: str, asked: Any, sites: Iterable[Site]) -> None:
    """Refuses a target that matches nothing, naming what exists."""
    if found:
        return
    names = list(dict.fromkeys(module.rsplit(".", 1)[-1] for s in sites for module in s.modules))
    if isinstance(asked, str):
        hint = (
            " A string is a regular expression for whole module paths, e.g. '.*q_proj'; names go in a list: "
            f"--config.peft.{asked_by}=\"['q_proj','v_proj']\"."
        )
    else:
        hint = did_you_mean(next(iter(asked), ""), names)
    raise UserError(
        f"No module matches {asked_by} {asked!r}.{hint}\n"
        f"The model has: {', '.join(names)}. Set `config.peft.{asked_by}`."
    )


# ---------------------------------------------------------------- PEFT's config keys, read strictly


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def check_count(key: str, value: Any, low: int = 1, high: int = 65536) -> None:
    """Refuses what is no integer from `low` to `high`.

    Raises:
      ValueError: naming the key.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{key} is {value!r}. It is an integer from {low} to {high}.")


def check_fraction(key: str, value: Any) -> None:
    """Refuses what is no probability below 1.

    Raises:
      ValueError: naming the key.
    """
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{key} is {value!r}. It is a probability, at least 0 and less than 1.")


def check_number(key: str, value: Any) -> None:
    """Refuses what is no finite number.

    Raises:
      ValueError: naming the key.
    """
    if not is_number(value):
        raise ValueError(f"{key} is {value!r}. It is a finite number.")


def check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses a value that is none of these.

    Raises:
      ValueError: naming the key and what it can be.
    """
    if not any(value is choice or (value == choice and type(value) is type(choice)) for choice in choices):
        raise ValueError(f"{key} is {value!r}. It can be: {', '.join(map(str, choices))}.")


def check_targets(config: Any) -> None:
    """Refuses patterns that are no regular expressions, and layers asked for of a pattern.

    Raises:
      ValueError: naming the key.
    """
    for key in ("target_modules", "exclude_modules"):
        value = getattr(config, key, None)
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{key} is {value!r}, which is no regular expression: {error}.") from None
    if getattr(config, "layers_to_transform", None) is not None and isinstance(config.target_modules, str):
        if config.target_modules.lower() != "all-linear":
            raise ValueError("layers_to_transform needs target_modules as a list of names, as in PEFT.")


# Written by peft beside a method's own keys; they say nothing about the mathematics.
BOOKKEEPING = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}


def read_config(cls: Any, values: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], where: str) -> Any:
    """An adapter_config.json (or our `peft` section) as the method's dataclass.

    Args:
      cls: the method's dataclass.  values: keys and values as PEFT writes them.
      neutral: keys of PEFT that the method does not have, with the values that mean "not used".
      where: named in errors.

    Raises:
      UserError: a key that is unknown, or known and used but not supported: refused by name, never ignored.
    """
    fields = {f.name for f in dataclasses.fields(cls)}
    taken = {}
    for key, value in values.items():
        if key in fields:
            taken[key] = value
        elif key in BOOKKEEPING:
            continue
        elif key not in neutral:
            raise UserError(
                f"{where} has the key {key!r}, which jaxtune does not know.{did_you_mean(key, fields)}\n"
                f"Supported: {', '.join(sorted(fields))}."
            )
        elif value not in neutral[key]:
            raise UserError(
                f"{where} sets {key}={value!r}, which jaxtune does not support yet."
                f"\nSupported keys: {', '.join(sorted(fields))}."
            )
    try:
        return cls(**taken)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
