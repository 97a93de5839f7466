"""What every method is made of: sites, PEFT's matching rules, values that do not train, and strict config keys.

A method is one file with these names:

  PEFT_TYPE        PEFT's word for it
  Config           a frozen dataclass of PEFT's own keys; NEUTRAL: PEFT's other keys and the values that mean "not used"
  plan(layout, config)                what gets an adapter, by parameter path; refuses what matches nothing
  init(key, layout, config, start)    {path: adapter}, fresh
  from_peft(layout, config, tensors)  {path: adapter} of a PEFT file, whose tensors are taken out as they are used
  to_config(layout, config, adapters) the keys that adapter_config.json gets

where it changes how training goes (AdaLoRA),

  penalty(config, trainable, frozen)  what is added to the loss, of leaves by path
  optimiser(inner, config, frozen)    an optimiser around the configured one

and a class of adapter.  An adapter is a pytree at the path of the parameter it adapts, boxed with its weight's logical
axes and stacked over layers as that is.  Inside the layer scan it has one layer's part of every array.

  linear(x, y, w, rng)    at a kernel: the new y [N, O] from x [N, I], y = x W and W [I, O]
  weight(w)               at a norm or a head: the new weight
  embed(table, tokens)    at the embedding: the rows of these tokens, before scaling
  merged(w)               the weight that does the same without an adapter; w float32
  to_peft(site, layer)    {PEFT's suffix: tensor} of one layer; empty where that layer has none

What all layers of a site have in common is the adapter's field `shared`, without a layer axis: a `Fixed`, or None.
Tensors of a PEFT file that belong to no module are named in OWN_NAMES, and written by the class's static method

  own_tensors(layout, adapters)       {PEFT's whole name: tensor}, of {path: adapter}

Prompts and prefixes belong to no weight; they lie at the paths `prompt` and `prefix` (jaxtune.peft.prompt), and their
`to_peft()` has no arguments and gives names in full.

  rows(rng)   at `prompt`: float32 embeddings [tasks * P, D] of the virtual tokens; the model multiplies them by `scale`
  kv()        at `prefix`: float32 keys and values before every text, each [L, P, K, H]
  folded()    optional: the adapter with what it computes from its own parameters computed; generation does so once

Such a method also has, where they apply,

  virtual(layout, config)  the `data.virtual.Virtual` tokens that the data puts before each row
  lost(layout, config)   {path: rank} of the kernels of which `init` needs what quantisation lost (`Start.lost`)
  continues_as(config)   (method's name, config) that a PEFT file trains on as, where it holds less than was trained
  OWN_NAMES, PREFIX      its tensors that belong to no module; what PEFT puts before those that do
  BEGUN                  {(key, what a file says): value to read}: how training began, where what came out is the same
  OUR_KEYS               keys of Config that PEFT does not have; they go into jaxtune.json, beside PEFT's files
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jaxtune import tree
from jaxtune.data.virtual import NONE, Virtual
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
    # linear | embedding | head | norm; bias: a table of relative positions; shared: an embedding that has further
    # modules of both stacks over it.
    kind: str

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"


class Layout(NamedTuple):
    """What a method may know of a model.

    family: gemma | gemma2 | gemma3 | …, for PEFT's defaults.  embed_scale: what rows of the embedding are multiplied
    with.  tied: the output head is the embedding.  The sizes are those of the text decoder; encoder_layers: 0 where no
    encoder stands before it.
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
    # What stands between `model.` and `layers` in a multimodal checkpoint ("language_model.").
    text_prefix: str = ""
    # nf4 | int8 | None: what linear layers are quantised to.
    quant: str | None = None
    encoder_layers: int = 0

    def peft_module(self, module: str) -> str:
        """A site's module path as PEFT has it over the checkpoint."""
        return module.replace("model.", f"model.{self.text_prefix}", 1) if self.text_prefix else module

    def site(self, path: str) -> Site:
        return next(s for s in self.sites if s.path == path)


class Start(NamedTuple):
    """What initial values may be drawn from.

    params: {path: the base's values, or the box of quantised ones}.  encode: text to token ids.  lost: {path: (u [L, I,
    R], s [L, R], v [L, R, O])}, the largest singular values of what quantisation took off a kernel, where `lost` asks.
    """

    params: Mapping[str, Any]
    encode: Callable[[str], Sequence[int]] | None = None
    lost: Mapping[str, Any] = MappingProxyType({})

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


def virtual_of(method: Any, layout: Layout, config: Any) -> Virtual:
    """The virtual tokens that a method has before every text; most have none."""
    return method.virtual(layout, config) if hasattr(method, "virtual") else NONE


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


def folded(variables: Mapping[str, Tree]) -> dict[str, Tree]:
    """The variables with what adapters compute from their own parameters (an encoder's output) computed."""

    def fold(adapter: Any) -> Any:
        return adapter.folded() if hasattr(adapter, "folded") else adapter

    adapters = jax.tree.map(fold, variables.get("adapters", {}), is_leaf=lambda x: hasattr(x, "to_peft"))
    return {**variables, "adapters": adapters}


def site_key(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for each path, whatever else is adapted."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def layer_of(adapter: Any, layer: Any) -> Any:
    """One layer's part of a stacked adapter, as the layer scan hands it to the doors."""
    shared = getattr(adapter, "shared", None)
    own = adapter if shared is None else adapter.replace(shared=None)
    part = jax.tree.map(lambda x: x[layer], own)
    return part if shared is None else part.replace(shared=shared)


def live_mask(layers: Sequence[bool]) -> Fixed | None:
    """Which layers of a stacked site have an adapter; None where all have."""
    return None if all(layers) else Fixed(jax.numpy.asarray(np.array(layers)))


def where_live(live: Fixed | None, value: Any, otherwise: Any) -> Any:
    """`value` in a layer that has an adapter; elsewhere `otherwise`, and no gradient."""
    return value if live is None else jax.numpy.where(live.value, value, otherwise)


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
QUERY_VALUE = {"": ("q_proj", "v_proj"), "t5": ("q", "v"), "mt5": ("q", "v")}

# PEFT's `target_modules` of an adapter that has only `modules_to_save` (DUMMY_TARGET_MODULES).
NO_TARGETS = "dummy-target-modules"


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
    if targets == NO_TARGETS and config.modules_to_save:
        return {}
    all_linear = isinstance(targets, str) and targets.lower() == "all-linear"
    excluded = getattr(config, "exclude_modules", None)
    layers = getattr(config, "layers_to_transform", None)
    layers = {layers} if isinstance(layers, int) else set(layers or ())

    def adapted(site: Site, module: str) -> bool:
        if excluded and names_match(excluded, module):
            return False
        if is_saved(config.modules_to_save, module):
            return False
        # In PEFT a module named in full is adapted whatever its layer.
        named = not isinstance(targets, str) and module in targets
        if layers and not named and layer_index(module, config.layers_pattern) not in layers:
            return False
        return site.kind == "linear" if all_linear else names_match(targets, module)

    chosen = {site.path: tuple(adapted(site, module) for module in site.modules) for site in layout.sites}
    found = {path: layers for path, layers in chosen.items() if any(layers)}
    require_match(list(found), "target_modules", targets, layout.sites)
    for site in layout.sites:
        if site.path in found:
            check_reached(site, "target_modules")
        if site.path in found and site.kind not in kinds:
            raise UserError(
                f"target_modules {targets!r} matches {site.modules[0]}, of kind {site.kind}. This method adapts: "
                f"{', '.join(kinds)}. Name that module in `modules_to_save` to train it whole."
            )
    if config.target_modules is not None and not isinstance(targets, str):
        # PEFT lets a name in a list match nothing as long as another does; a misspelt name would go unnoticed.
        modules = [module for site in layout.sites for module in site.modules]
        for name in targets:
            require_match([m for m in modules if names_match([name], m)], "target_modules", [name], layout.sites)
    return found


def without_idle_targets(layout: Layout, config: Any) -> Any:
    """A file's config without those of its `target_modules` that match nothing here: peft lets them stand next to
    others, published files have them, and what a file holds is checked tensor by tensor anyway."""
    named = getattr(config, "target_modules", None)
    if named is None or isinstance(named, str):
        return config
    modules = [module for site in layout.sites for module in site.modules]
    known = [name for name in named if any(names_match([name], module) for module in modules)]
    return dataclasses.replace(config, target_modules=known) if known and len(known) < len(named) else config


def check_reached(site: Site, key: str) -> None:
    """Refuses a module over which an adapter of PEFT's would do nothing.

    Raises:
      UserError: naming what there is instead.
    """
    if site.kind == "shared":
        raise UserError(
            f"`{key}` means {site.modules[0]}. PEFT adapts that module alone, through which no token goes: encoder and "
            "decoder have embeddings of their own that share its weight, and what was trained would do nothing. "
            "Train some of its rows with trainable_token_indices, or all with peft.method=partial and "
            "export.format=checkpoint."
        )


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
