"""RandLoRA: y = x W + s (dropout(x) A') B, a full-rank update from many frozen random bases of rank r that all modules
share; trained are λ and γ, which scale A by rank, by basis and by column: A' = λ ∘ A ∘ γ, s = alpha/r.

Albert et al. 2025 (arXiv 2502.00987); equals peft's `randlora.Linear`.  With m the smaller and M the larger side of W
and n = ⌈m/r⌉ bases, λ is [r, n], γ [n, m], A [r, m] (one for all bases) and B [M, n, r].  A' is at W's smaller side:
where that is the output, x goes through B first.  PEFT pairs (rank, basis) of A' with (basis, rank) of B, in the order
they lie in memory, and so does this.

Where A and B come from is as in VeRA (jaxtune.peft.vera).  PEFT's files hold them once, and again for every module; so
do ours, because PEFT warns of missing tensors otherwise.
"""

import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.errors import UserError
from jaxtune.peft import lora
from jaxtune.peft.keys import check_choice, check_count, check_fraction, check_number, check_targets
from jaxtune.peft.method import QUERY_VALUE, Fixed, Layout, Site, Start, box, select, site_key, take
from jaxtune.peft.vera import check_projections, largest, projection_key, whole_of

PEFT_TYPE = "RANDLORA"

NEUTRAL: dict[str, tuple[Any, ...]] = {"fan_in_fan_out": (False,)}

NAMES = ("randlora_A", "randlora_B")
OWN_NAMES = tuple(f"base_model.{name}" for name in NAMES)


@dataclasses.dataclass(frozen=True)
class Config:
    """PEFT's keys and defaults.

    Raises:
      ValueError: a value out of range, naming the key.
    """

    r: Any = 32
    target_modules: Any = None
    projection_prng_key: Any = 0
    save_projection: Any = True
    sparse: Any = False
    very_sparse: Any = False
    randlora_dropout: Any = 0.0
    randlora_alpha: Any = 640
    bias: Any = "none"
    modules_to_save: Any = None
    init_weights: Any = True
    layers_to_transform: Any = None
    layers_pattern: Any = None

    def __post_init__(self):
        check_count("r", self.r)
        check_fraction("randlora_dropout", self.randlora_dropout)
        check_number("randlora_alpha", self.randlora_alpha)
        check_choice("bias", self.bias, ("none", "all", "randlora_only"))
        for key in ("sparse", "very_sparse", "init_weights"):
            check_choice(key, getattr(self, key), (True, False))
        check_targets(self)
        check_projections(self)


@struct.dataclass
class RandLora:
    """by_rank (λ) [L, r, n], by_column (γ) [L, n, m]; inside the layer scan without L.  Both are zero in a layer that
    has no adapter, and stay so.  layers: which have one.

    shared: {"a": [r, m or more], "b": [M or more, n or more, r]}.
    """

    by_rank: Any
    by_column: Any
    shared: Fixed | None
    layers: tuple[bool, ...] = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)

    def factors(self, w: Any) -> tuple[Any, Any]:
        """The two matrices that x goes through, [in, n r] and [n r, out]."""
        assert self.shared is not None
        n, m = self.by_column.shape
        a = self.by_rank[:, :, None] * self.shared.value["a"][:, None, :m] * self.by_column[None]  # [r, n, m]
        a, b = a.reshape(-1, m), self.shared.value["b"][: max(w.shape), :n].reshape(max(w.shape), -1)
        return (a.T, b.T) if w.shape[0] <= w.shape[1] else (b, a)

    def linear(self, x, y, w, rng):
        return y + lora.low_rank(lora.dropout(x, self.dropout, rng), *self.factors(w), self.scale)

    def merged(self, w):
        first, second = self.factors(w)
        return w + self.scale * (first @ second)

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        if not self.layers[layer]:
            return {}
        values = {"randlora_lambda": self.by_rank, "randlora_gamma": self.by_column}
        return {name: np.asarray(value[layer]) for name, value in values.items()}

    @staticmethod
    def own_tensors(layout: Layout, adapters: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The bases by PEFT's names, once and of every module."""
        a, b = whole_of(adapters)
        values = dict(zip(NAMES, (np.asarray(a)[:, None], np.asarray(b)), strict=True))
        places = ["base_model"] + [
            f"base_model.model.{layout.peft_module(module)}"
            for path, adapter in adapters.items()
            for module, adapted in zip(layout.site(path).modules, adapter.layers, strict=True)
            if adapted
        ]
        return {f"{place}.{name}": value for place in places for name, value in values.items()}


def plan(layout: Layout, config: Config) -> dict[str, tuple[bool, ...]]:
    """{path: whether each layer has an adapter}.

    Raises:
      UserError: nothing matches, or something matches that is not linear.
    """
    return select(layout, config, QUERY_VALUE)


def sizes(sides: Sequence[int], config: Config) -> tuple[int, int, int]:
    """(m, M, n) of a weight, or of the largest sides of all of them."""
    return min(sides), max(sides), -(-min(sides) // config.r)


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """A and B uniform, or sparse signs, of variance 1; λ zero and γ constant; or λ ~ N(0, 1)."""
    found = plan(layout, config)
    sides = largest(layout, list(found))
    (m, M, n), (key_a, key_b) = sizes(sides, config), jax.random.split(projection_key(config))
    a, b = (_basis(k, shape, sides, config) for k, shape in ((key_a, (config.r, m)), (key_b, (M, n, config.r))))
    adapters = {}
    for path, layers in found.items():
        site, live = layout.site(path), jnp.asarray(np.array(layers, np.float32))[:, None, None]
        shapes = _shapes(site, config)
        by_rank = jnp.zeros(shapes[0]) if config.init_weights else jax.random.normal(site_key(key, path), shapes[0])
        over = max(shapes[1][1:]) if config.init_weights else max(site.shape[1:])
        adapters[path] = _boxed(
            site, layers, config, by_rank * live, jnp.full(shapes[1], 1 / over) * live, a, b, whole=not adapters
        )
    return adapters


def _basis(key: jax.Array, shape: tuple[int, ...], sides: Sequence[int], config: Config) -> Any:
    value = jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
    if config.sparse or config.very_sparse:
        kept = min(sides) ** -0.5 if config.very_sparse else 1 / 3
        value = jnp.where(jnp.abs(value) > 1 - kept, jnp.sign(value), jnp.zeros_like(value))
    return value / jnp.std(value, ddof=1)


def from_peft(layout: Layout, config: Config, tensors: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """{path: adapter} from PEFT's tensors.

    Raises:
      KeyError: a tensor is missing.  UserError: one has another shape; or a module's copy of a basis is not the one
        that is shared.
    """
    found = plan(layout, config)
    m, M, n = sizes(largest(layout, list(found)), config)
    whole = {
        name: take(tensors, own, shape, f"r={config.r}")
        for name, own, shape in zip(NAMES, OWN_NAMES, ((config.r, 1, m), (M, n, config.r)), strict=True)
    }
    a, b = whole["randlora_A"][:, 0], whole["randlora_B"]
    adapters = {}
    for path, layers in found.items():
        site = layout.site(path)
        by_rank, by_column = (np.zeros(shape, np.float32) for shape in _shapes(site, config))
        for layer, (module, adapted) in enumerate(zip(site.modules, layers, strict=True)):
            if not adapted:
                continue
            by_rank[layer] = take(tensors, f"{module}.randlora_lambda", by_rank.shape[1:], f"r={config.r}")
            by_column[layer] = take(tensors, f"{module}.randlora_gamma", by_column.shape[1:], f"r={config.r}")
            for name, value in whole.items():
                copy = tensors.pop(f"{module}.{name}", value)
                if not np.array_equal(copy, value):
                    raise UserError(
                        f"The adapter's {module}.{name} is not its base_model.{name}. All modules share one; the file "
                        "is damaged, or joined from two."
                    )
        adapters[path] = _boxed(site, layers, config, by_rank, by_column, a, b, whole=not adapters)
    return adapters


def _shapes(site: Site, config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    m, _, n = sizes(site.shape[1:], config)
    return (site.shape[0], config.r, n), (site.shape[0], n, m)


def _boxed(
    site: Site, layers: tuple[bool, ...], config: Config, by_rank: Any, by_column: Any, a: Any, b: Any, *, whole: bool
) -> RandLora:
    """The first adapter keeps the bases whole, for the export; the others what they read."""
    if not whole:
        m, M, n = sizes(site.shape[1:], config)
        a, b = a[:, :m], b[:M, :n]
    return RandLora(
        by_rank=box(by_rank, site.axes[0], "rank", None),
        by_column=box(by_column, site.axes[0], None, None),
        shared=Fixed({"a": box(a, "rank", None), "b": box(b, None, None, "rank")}),
        layers=layers,
        scale=config.randlora_alpha / config.r,
        dropout=config.randlora_dropout,
    )


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys."""
    return dict(vars(config))
