"""LoHa: y = x (W + s (A1 B1) ∘ (A2 B2)), the element-wise product of two low-rank matrices, with s = alpha/r.

Hyeon-Woo et al. 2021 (FedPara, arXiv 2108.06098), Yeh et al. 2023 (LyCORIS, 2309.14859); equals peft's `loha.Linear`.
PEFT stores hada_w1_a [out, r] and hada_w1_b [r, in]; here they are b1 [r, out] and a1 [in, r], stacked over layers.

The product of two matrices of rank r has rank r² at most, with the products of every pair of columns as its columns.
Where r² is small, x goes through those and the whole matrix is never formed.
"""

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.layers import matmul
from jaxtune.peft import lora, lycoris
from jaxtune.peft.keys import check_choice
from jaxtune.peft.method import Fixed, Layout, Site, Start, box, site_key, take

PEFT_TYPE = "LOHA"

NEUTRAL: dict[str, tuple[Any, ...]] = {}

NAMES = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}


@dataclasses.dataclass(frozen=True)
class Config:
    """PEFT's keys and defaults.

    Raises:
      ValueError: a value out of range, naming the key.
    """

    r: Any = 8
    alpha: Any = 8
    rank_dropout: Any = 0.0
    module_dropout: Any = 0.0
    use_effective_conv2d: Any = False
    target_modules: Any = None
    exclude_modules: Any = None
    init_weights: Any = True
    layers_to_transform: Any = None
    layers_pattern: Any = None
    rank_pattern: Any = None
    alpha_pattern: Any = None
    modules_to_save: Any = None

    def __post_init__(self):
        lycoris.check(self)
        check_choice("init_weights", self.init_weights, (True, False))


@struct.dataclass
class LoHa:
    """a1, a2 [L, in, R], b1, b2 [L, R, out], scale [L]; inside the layer scan without L.  ranks: one per layer, 0 where
    it has no adapter; the surplus is zero and stays so."""

    a1: Any
    b1: Any
    a2: Any
    b2: Any
    scale: Fixed
    ranks: tuple[int, ...] = struct.field(pytree_node=False)
    rank_dropout: float = struct.field(pytree_node=False)
    module_dropout: float = struct.field(pytree_node=False)

    def linear(self, x, y, w, rng):
        rows, columns = w.shape
        pairs = max(self.ranks) ** 2
        if pairs * (rows + columns) < rows * columns:
            a = (self.a1[:, :, None] * self.a2[:, None, :]).reshape(rows, pairs)
            b = (self.b1[:, None, :] * self.b2[None, :, :]).reshape(pairs, columns)
            added = lora.low_rank(x, a, b, self.scale.value)
        else:
            added = matmul(x, self.product()) * self.scale.value
        return y + lycoris.drop(added, rng, self.rank_dropout, self.module_dropout)

    def product(self) -> Any:
        return (self.a1 @ self.b1) * (self.a2 @ self.b2)

    def merged(self, w):
        return w + self.scale.value * self.product()

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        r = self.ranks[layer]
        if r == 0:
            return {}
        values = {field: np.asarray(getattr(self, field)[layer]) for field in NAMES}
        return {NAMES[f]: (v[:, :r] if f[0] == "a" else v[:r]).T for f, v in values.items()}


def plan(layout: Layout, config: Config) -> dict[str, tuple[int, ...]]:
    """{path: rank of each layer} of the sites that get an adapter.

    Raises:
      UserError: nothing matches, or something matches that is not linear.
    """
    return lycoris.ranks_by_site(layout, config)


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """All Kaiming but A2, which is zero so that nothing is added at first."""
    adapters = {}
    for path, ranks in plan(layout, config).items():
        site, live, values = layout.site(path), lycoris.live_ranks(ranks), {}
        for sub, (field, shape) in zip(jax.random.split(site_key(key, path), 4), _shapes(site, ranks), strict=True):
            is_a = field[0] == "a"
            value = lycoris.kaiming(sub, shape, site.shape[1] if is_a else np.array(ranks))
            zero = field == "a2" and config.init_weights
            values[field] = jnp.zeros(shape) if zero else value * (live[:, None, :] if is_a else live[:, :, None])
        adapters[path] = _boxed(site, ranks, config, values)
    return adapters


def from_peft(layout: Layout, config: Config, tensors: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """{path: adapter} from PEFT's tensors.

    Raises:
      KeyError, UserError: as `method.take`.
    """
    adapters = {}
    for path, ranks in plan(layout, config).items():
        site = layout.site(path)
        (rows, columns), values = site.shape[1:], {f: np.zeros(shape, np.float32) for f, shape in _shapes(site, ranks)}
        for layer, (module, r) in enumerate(zip(site.modules, ranks, strict=True)):
            for field, value in values.items() if r else ():
                name = f"{module}.{NAMES[field]}"
                if field[0] == "a":
                    value[layer, :, :r] = take(tensors, name, (r, rows), f"rank {r}").T
                else:
                    value[layer, :r] = take(tensors, name, (columns, r), f"rank {r}").T
        adapters[path] = _boxed(site, ranks, config, values)
    return adapters


def _shapes(site: Site, ranks: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    (L, rows, columns), R = site.shape, max(ranks)
    return [(field, (L, rows, R) if field[0] == "a" else (L, R, columns)) for field in NAMES]


def _boxed(site: Site, ranks: tuple[int, ...], config: Config, values: Mapping[str, Any]) -> LoHa:
    layers, rows, columns = site.axes
    axes = {"a": (layers, rows, "rank"), "b": (layers, "rank", columns)}
    return LoHa(
        **{field: box(value, *axes[field[0]]) for field, value in values.items()},
        scale=lycoris.scales(site, ranks, config),
        ranks=ranks,
        rank_dropout=config.rank_dropout,
        module_dropout=config.module_dropout,
    )


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys."""
    return dict(vars(config))
