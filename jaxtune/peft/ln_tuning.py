"""LN tuning: the norms' own weights train, as copies beside the frozen ones.

Zhao et al. 2023 (arXiv 2312.11420); equals peft's `LNTuningLayer`.  PEFT would copy any module that way; here a module
that is no norm goes into `modules_to_save`, which does the same.
"""

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.peft.keys import check_targets
from jaxtune.peft.method import Fixed, Layout, Site, Start, box, live_mask, select, take, where_live

PEFT_TYPE = "LN_TUNING"

NEUTRAL: dict[str, tuple[Any, ...]] = {}

# PEFT's TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING.
_TWO = ("input_layernorm", "post_attention_layernorm", "norm")
_FOUR = (*_TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")
TARGETS = {
    "": _TWO,
    "gemma2": _FOUR,
    "gemma3": _FOUR,
    "qwen3": ("post_attention_layernorm",),
    "t5": ("layer_norm", "final_layer_norm"),
    "mt5": ("layer_norm", "final_layer_norm"),
}

SUFFIX = "ln_tuning_layers.weight"


@dataclasses.dataclass(frozen=True)
class Config:
    """PEFT's keys and defaults; None is the model family's.

    Raises:
      ValueError: a value out of range, naming the key.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None

    def __post_init__(self):
        check_targets(self)


@struct.dataclass
class LnTuning:
    """value: the norm's weight [L, D], or [D] where the norm is the only one.  layers: which have an adapter."""

    value: Any
    live: Fixed | None
    layers: tuple[bool, ...] = struct.field(pytree_node=False)

    def weight(self, w):
        return where_live(self.live, self.value, w.astype(jnp.float32))

    def merged(self, w):
        return self.weight(w)

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        return {SUFFIX: np.asarray(self.value[layer] if site.stacked else self.value)} if self.layers[layer] else {}


def plan(layout: Layout, config: Config) -> dict[str, tuple[bool, ...]]:
    """{path: whether each layer has an adapter}.

    Raises:
      UserError: nothing matches, or something matches that is no norm.
    """
    return select(layout, config, TARGETS, ("norm",))


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """Copies of the base's weights, in float32."""
    found = plan(layout, config).items()
    return {p: _boxed(layout.site(p), layers, start.params[p].astype(jnp.float32)) for p, layers in found}


def from_peft(layout: Layout, config: Config, tensors: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """{path: adapter} from PEFT's tensors.

    Raises:
      KeyError, UserError: as `method.take`.
    """
    adapters = {}
    for path, layers in plan(layout, config).items():
        site = layout.site(path)
        value = np.zeros(site.shape, np.float32).reshape(len(layers), -1)
        for layer, (module, adapted) in enumerate(zip(site.modules, layers, strict=True)):
            if adapted:
                value[layer] = take(tensors, f"{module}.{SUFFIX}", site.shape[-1:])
        adapters[path] = _boxed(site, layers, value.reshape(site.shape))
    return adapters


def _boxed(site: Site, layers: tuple[bool, ...], value: Any) -> LnTuning:
    return LnTuning(box(value, *site.axes), live_mask(layers), layers)


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys."""
    return dict(vars(config))
