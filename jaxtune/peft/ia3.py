"""(IA)³: y = l ∘ (x W), and in feed-forward modules y = (l ∘ x) W, with a trained vector l that starts at ones.

Liu et al. 2022 (arXiv 2205.05638); equals peft's `ia3.Linear`.  PEFT stores l as [out, 1], or [1, in] where the input
is scaled; here it is [L, out] or [L, in].
"""

import dataclasses
import re
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.errors import UserError
from jaxtune.layers import matmul
from jaxtune.peft.keys import check_choice, check_targets
from jaxtune.peft.method import (
    Fixed,
    Layout,
    Site,
    Start,
    box,
    live_mask,
    select,
    site_key,
    spellings,
    take,
    where_live,
)

PEFT_TYPE = "IA3"

NEUTRAL: dict[str, tuple[Any, ...]] = {"fan_in_fan_out": (False,)}

# PEFT's TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING and …_FEEDFORWARD_MODULES_MAPPING.
_KEYS = ("k_proj", "v_proj", "down_proj")
TARGETS = {"": ("q_proj", "v_proj", "down_proj"), "llama": _KEYS, "mistral": _KEYS, "t5": ("k", "v", "wo")}
TARGETS |= {"mt5": ("k", "v", "wi_1")}
FEEDFORWARD = {"": ("down_proj",), "t5": ("wo",), "mt5": ()}


@dataclasses.dataclass(frozen=True)
class Config:
    """PEFT's keys and defaults; None is the model family's.

    Raises:
      ValueError: a value out of range, naming the key.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    feedforward_modules: Any = None
    modules_to_save: Any = None
    init_ia3_weights: Any = True

    def __post_init__(self):
        check_targets(self)
        check_choice("init_ia3_weights", self.init_ia3_weights, (True, False))
        targets, feedforward = (
            [] if isinstance(v, str) else v for v in (self.target_modules, self.feedforward_modules)
        )
        if targets and feedforward and not set(feedforward) <= set(targets):
            raise ValueError(
                f"feedforward_modules is {list(feedforward)!r}. Each of them must be among target_modules, "
                f"{list(targets)!r}."
            )


@struct.dataclass
class IA3:
    """scale: [L, in] if feedforward else [L, out]; inside the layer scan without L.  layers: which have an adapter."""

    scale: Any
    live: Fixed | None
    layers: tuple[bool, ...] = struct.field(pytree_node=False)
    feedforward: bool = struct.field(pytree_node=False)

    def factor(self) -> Any:
        return where_live(self.live, self.scale, jnp.ones_like(self.scale))

    def linear(self, x, y, w, rng):
        if self.feedforward:
            return matmul((x.astype(jnp.float32) * self.factor()[None]).astype(x.dtype), w)
        return y * self.factor()[None]

    def merged(self, w):
        return w * (self.factor()[:, None] if self.feedforward else self.factor()[None])

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        if not self.layers[layer]:
            return {}
        scale = np.asarray(self.scale[layer])
        return {"ia3_l": scale[None] if self.feedforward else scale[:, None]}


class Plan(NamedTuple):
    layers: tuple[bool, ...]  # which have an adapter
    feedforward: bool


def plan(layout: Layout, config: Config) -> dict[str, Plan]:
    """What each site gets, by path.

    Raises:
      UserError: nothing matches, or `feedforward_modules` names some layers of a site and not others.
    """
    pattern, plans = re.compile(feedforward_pattern(layout, config)), {}
    for path, layers in select(layout, config, TARGETS).items():
        modules = [m for m, adapted in zip(layout.site(path).modules, layers, strict=True) if adapted]
        is_feedforward = {any(pattern.fullmatch(s) for s in spellings(module)) for module in modules}
        if len(is_feedforward) > 1:
            raise UserError(
                f"feedforward_modules {config.feedforward_modules!r} matches some layers of {path} and not others. "
                "Name the module without its layer."
            )
        plans[path] = Plan(layers, is_feedforward.pop())
    return plans


def feedforward_pattern(layout: Layout, config: Config) -> str:
    """`feedforward_modules` as one regular expression for module paths; a list holds ends of paths, whole or not."""
    names = config.feedforward_modules
    if names is None:
        names = FEEDFORWARD.get(layout.family, FEEDFORWARD[""])
    return names if isinstance(names, str) else f".*({'|'.join(map(re.escape, sorted(names)))})" if names else "(?!)"


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """Ones; or, as peft has it where they are not wanted, N(0, 1)."""
    adapters = {}
    for path, chosen in plan(layout, config).items():
        shape = _shape(layout.site(path), chosen)
        scale = jnp.ones(shape) if config.init_ia3_weights else jax.random.normal(site_key(key, path), shape)
        adapters[path] = _boxed(layout.site(path), chosen, scale)
    return adapters


def from_peft(layout: Layout, config: Config, tensors: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """{path: adapter} from PEFT's tensors.

    Raises:
      KeyError, UserError: as `method.take`.
    """
    adapters = {}
    for path, chosen in plan(layout, config).items():
        site = layout.site(path)
        scale = np.ones(_shape(site, chosen), np.float32)
        size = scale.shape[1]
        for layer, (module, adapted) in enumerate(zip(site.modules, chosen.layers, strict=True)):
            if adapted:
                shape = (1, size) if chosen.feedforward else (size, 1)
                scale[layer] = take(tensors, f"{module}.ia3_l", shape).reshape(-1)
        adapters[path] = _boxed(site, chosen, scale)
    return adapters


def _shape(site: Site, chosen: Plan) -> tuple[int, int]:
    return site.shape[0], site.shape[1 if chosen.feedforward else 2]


def _boxed(site: Site, chosen: Plan, scale: Any) -> IA3:
    axis = site.axes[1 if chosen.feedforward else 2]
    return IA3(box(scale, site.axes[0], axis), live_mask(chosen.layers), chosen.layers, chosen.feedforward)


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys.  PEFT refuses `feedforward_modules` that are not literally among target_modules,
    which the export may have to spell out; as a pattern it takes them all the same."""
    return {**vars(config), "feedforward_modules": feedforward_pattern(layout, config)}
