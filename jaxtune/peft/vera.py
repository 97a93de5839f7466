"""VeRA: y = x W + b ∘ ((d ∘ (dropout(x) A)) B), with frozen random A and B that all modules share and trained d and b.

Kopiczko et al. 2023 (arXiv 2310.11454); equals peft's `vera.Linear`.  PEFT stores vera_A [r, in] and vera_B [out, r] of
the largest sizes, once, and a module reads as much of them as it needs; here they are a [in, r] and b [r, out].

PEFT draws A and B with torch's generator, which cannot be reproduced here.  jaxtune draws its own from
`projection_prng_key` and always saves them, so that PEFT reads them instead of drawing.
"""

import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.layers import matmul
from jaxtune.peft import lora
from jaxtune.peft.keys import check_choice, check_count, check_fraction, check_number, check_targets
from jaxtune.peft.method import QUERY_VALUE, Fixed, Layout, Site, Start, box, select, site_key, take

PEFT_TYPE = "VERA"

NEUTRAL: dict[str, tuple[Any, ...]] = {"fan_in_fan_out": (False,)}

A, B = OWN_NAMES = ("base_model.vera_A", "base_model.vera_B")


def check_projections(config: Any) -> None:
    """Refuses projections that would have to be drawn again.

    Raises:
      ValueError: naming the key.
    """
    check_count("projection_prng_key", config.projection_prng_key, low=0, high=2**63 - 1)
    if config.save_projection is not True:
        raise ValueError(
            f"save_projection is {config.save_projection!r}. Without them in its file, an adapter's random projections "
            "would be drawn again by torch's generator, which cannot be reproduced here. Save it with "
            "save_projection=True."
        )


def projection_key(config: Any) -> jax.Array:
    """As in PEFT, what is drawn depends on this key alone, not on the run's seed."""
    return jax.random.key(config.projection_prng_key % 2**31)


@dataclasses.dataclass(frozen=True)
class Config:
    """PEFT's keys and defaults.

    Raises:
      ValueError: a value out of range, naming the key.
    """

    r: Any = 256
    target_modules: Any = None
    projection_prng_key: Any = 0
    save_projection: Any = True
    vera_dropout: Any = 0.0
    d_initial: Any = 0.1
    bias: Any = "none"
    modules_to_save: Any = None
    init_weights: Any = True
    layers_to_transform: Any = None
    layers_pattern: Any = None

    def __post_init__(self):
        check_count("r", self.r)
        check_fraction("vera_dropout", self.vera_dropout)
        check_number("d_initial", self.d_initial)
        check_choice("bias", self.bias, ("none", "all", "vera_only"))
        check_choice("init_weights", self.init_weights, (True, False))
        check_targets(self)
        check_projections(self)


@struct.dataclass
class Vera:
    """inner [L, r], outer [L, out]: the paper's d and b; inside the layer scan without L.  Both are zero in a layer
    without an adapter, and stay so.  layers: which have one.

    shared: {"a": [in or more, r], "b": [r, out or more]}.
    """

    inner: Any
    outer: Any
    shared: Fixed | None
    layers: tuple[bool, ...] = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)

    def projections(self, w: Any) -> tuple[Any, Any]:
        assert self.shared is not None
        return self.shared.value["a"][: w.shape[0]], self.shared.value["b"][:, : w.shape[1]]

    def linear(self, x, y, w, rng):
        a, b = self.projections(w)
        low = matmul(lora.dropout(x, self.dropout, rng), a) * self.inner[None]
        return y + matmul(low.astype(x.dtype), b) * self.outer[None]

    def merged(self, w):
        a, b = self.projections(w)
        return w + ((a * self.inner[None]) @ b) * self.outer[None]

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        if not self.layers[layer]:
            return {}
        return {"vera_lambda_d": np.asarray(self.inner[layer]), "vera_lambda_b": np.asarray(self.outer[layer])}

    @staticmethod
    def own_tensors(layout: Layout, adapters: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The projections by PEFT's names."""
        a, b = whole_of(adapters)
        return {A: np.asarray(a).T, B: np.asarray(b).T}


def plan(layout: Layout, config: Config) -> dict[str, tuple[bool, ...]]:
    """{path: whether each layer has an adapter}.

    Raises:
      UserError: nothing matches, or something matches that is not linear.
    """
    return select(layout, config, QUERY_VALUE)


def largest(layout: Layout, paths: Sequence[str]) -> tuple[int, int]:
    """(inputs, outputs) that the shared projections have to serve."""
    shapes = [layout.site(path).shape[1:] for path in paths]
    return max(rows for rows, _ in shapes), max(columns for _, columns in shapes)


def whole_of(adapters: Mapping[str, Any]) -> tuple[Any, Any]:
    """The projections as PEFT has them; one of the adapters has them whole."""
    a, b = (max((x.shared.value[key] for x in adapters.values()), key=lambda v: v.size) for key in "ab")
    return a, b


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """A and B ~ U(±sqrt(6 / fan-in)), d constant and b zero; or d ~ N(0, 1) and b one."""
    found = plan(layout, config)
    rows, columns = largest(layout, list(found))
    keys = jax.random.split(projection_key(config))
    a = jax.random.uniform(keys[0], (rows, config.r), minval=-1.0, maxval=1.0) * (6 / rows) ** 0.5
    b = jax.random.uniform(keys[1], (config.r, columns), minval=-1.0, maxval=1.0) * (6 / config.r) ** 0.5
    adapters = {}
    for path, layers in found.items():
        site, live = layout.site(path), jnp.asarray(np.array(layers, np.float32))[:, None]
        inner = jnp.full((len(layers), config.r), config.d_initial, jnp.float32)
        outer = jnp.zeros((len(layers), site.shape[2]))
        if not config.init_weights:
            inner, outer = jax.random.normal(site_key(key, path), inner.shape), jnp.ones_like(outer)
        adapters[path] = _boxed(site, layers, config, inner * live, outer * live, a, b, whole=not adapters)
    return adapters


def from_peft(layout: Layout, config: Config, tensors: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """{path: adapter} from PEFT's tensors.

    Raises:
      KeyError, UserError: as `method.take`.
    """
    found = plan(layout, config)
    rows, columns = largest(layout, list(found))
    a, b = take(tensors, A, (config.r, rows)).T, take(tensors, B, (columns, config.r)).T
    adapters = {}
    for path, layers in found.items():
        site = layout.site(path)
        inner = np.zeros((len(layers), config.r), np.float32)
        outer = np.zeros((len(layers), site.shape[2]), np.float32)
        for layer, (module, adapted) in enumerate(zip(site.modules, layers, strict=True)):
            if adapted:
                inner[layer] = take(tensors, f"{module}.vera_lambda_d", inner.shape[1:], f"r={config.r}")
                outer[layer] = take(tensors, f"{module}.vera_lambda_b", outer.shape[1:])
        adapters[path] = _boxed(site, layers, config, inner, outer, a, b, whole=not adapters)
    return adapters


def _boxed(
    site: Site, layers: tuple[bool, ...], config: Config, inner: Any, outer: Any, a: Any, b: Any, *, whole: bool
) -> Vera:
    """The first adapter keeps the projections whole, for the export; the others what they read."""
    if not whole:
        a, b = a[: site.shape[1]], b[:, : site.shape[2]]
    return Vera(
        inner=box(inner, site.axes[0], "rank"),
        outer=box(outer, site.axes[0], site.axes[2]),
        shared=Fixed({"a": box(a, None, "rank"), "b": box(b, "rank", None)}),
        layers=layers,
        dropout=config.vera_dropout,
    )


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys."""
    return dict(vars(config))
