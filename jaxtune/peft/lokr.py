"""LoKr: y = x (W + s W1 ⊗ W2), a Kronecker product of two small matrices, with s = alpha/r; each may be of low rank.

Yeh et al. 2023 (LyCORIS, arXiv 2309.14859); equals peft's `lokr.Linear`.  in = i1 i2 and out = o1 o2 by the factors
nearest to each other, or to `decompose_factor`.  PEFT stores lokr_w1 [o1, i1], or lokr_w1_a [o1, r] and lokr_w1_b
[r, i1], and likewise lokr_w2; here every tensor is turned, so that x goes through `_b` and then `_a`.

Which of them a module has depends on its sizes and its rank.  The Kronecker product is never formed: with x as
[N, i1, i2], W2 takes i2 to o2 and W1 takes i1 to o1.
"""

import dataclasses
import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.errors import UserError
from jaxtune.layers import matmul
from jaxtune.peft import lycoris
from jaxtune.peft.keys import check_choice, check_count
from jaxtune.peft.method import Fixed, Layout, Site, Start, box, site_key, take

PEFT_TYPE = "LOKR"

NEUTRAL: dict[str, tuple[Any, ...]] = {}


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
    decompose_both: Any = False
    decompose_factor: Any = -1
    rank_dropout_scale: Any = False
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
        if self.decompose_factor != -1:
            check_count("decompose_factor", self.decompose_factor)
        check_choice("init_weights", self.init_weights, (True, False, "lycoris"))
        for key in ("decompose_both", "rank_dropout_scale"):
            check_choice(key, getattr(self, key), (True, False))


@struct.dataclass
class LoKr:
    """first, second: {PEFT's name: [L, …]}, one matrix [i, o] or two, [i, R] and [R, o], in the order x meets them;
    scale [L].  Inside the layer scan without L.  ranks: one per layer, 0 where it has no adapter; the surplus is zero
    and stays so."""

    first: dict[str, Any]
    second: dict[str, Any]
    scale: Fixed
    ranks: tuple[int, ...] = struct.field(pytree_node=False)
    rank_dropout: float = struct.field(pytree_node=False)
    rank_dropout_scale: bool = struct.field(pytree_node=False)
    module_dropout: float = struct.field(pytree_node=False)

    def linear(self, x, y, w, rng):
        N, i2 = x.shape[0], _order(self.second)[0].shape[0]
        inner = _through(x.reshape(-1, i2), self.second).astype(x.dtype)  # [N i1, o2]
        inner = jnp.swapaxes(inner.reshape(N, -1, inner.shape[-1]), 1, 2)  # [N, o2, i1]
        added = _through(inner.reshape(-1, inner.shape[-1]), self.first)  # [N o2, o1]
        added = jnp.swapaxes(added.reshape(N, -1, added.shape[-1]), 1, 2).reshape(N, -1) * self.scale.value
        return y + lycoris.drop(added, rng, self.rank_dropout, self.module_dropout, self.rank_dropout_scale)

    def merged(self, w):
        first, second = (_through(jnp.eye(_order(f)[0].shape[0]), f) for f in (self.first, self.second))
        return w + self.scale.value * jnp.kron(first, second)

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        r, values = self.ranks[layer], self.first | self.second
        return {name: _cut(name, np.asarray(value[layer]), r).T for name, value in values.items()} if r else {}


def _order(factors: Mapping[str, Any]) -> list[Any]:
    """The matrices in the order x meets them: `_b` before `_a`, whatever a pytree made of the dict."""
    return [factors[name] for name in sorted(factors, reverse=True)]


def _through(x: Any, factors: Mapping[str, Any]) -> Any:
    first, *rest = _order(factors)
    out = matmul(x, first)
    for matrix in rest:
        out = matmul(out.astype(x.dtype), matrix)
    return out


def _cut(name: str, value: Any, r: int) -> Any:
    """A layer's matrix without the surplus of ranks."""
    return value[:, :r] if name.endswith("_b") else value[:r] if name.endswith("_a") else value


def factorization(size: int, factor: int) -> tuple[int, int]:
    """PEFT's two factors of a size: `factor` and the rest where it divides, else the divisor next below it and below
    the root; -1 is the root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(d for d in range(limit, 0, -1) if size % d == 0)
    return first, size // first


def shapes(site: Site, r: int, config: Config) -> dict[str, tuple[int, int]]:
    """{PEFT's name: shape here} of a module of this rank."""
    (i1, i2), (o1, o2) = (factorization(size, config.decompose_factor) for size in site.shape[1:])

    def part(name: str, rows: int, columns: int, split: bool) -> dict[str, tuple[int, int]]:
        return {f"{name}_b": (rows, r), f"{name}_a": (r, columns)} if split else {name: (rows, columns)}

    return part("lokr_w1", i1, o1, config.decompose_both and r < max(o1, i1) / 2) | part(
        "lokr_w2", i2, o2, r < max(o2, i2) / 2
    )


def plan(layout: Layout, config: Config) -> dict[str, tuple[int, ...]]:
    """{path: rank of each layer} of the sites that get an adapter.

    Raises:
      UserError: nothing matches, something matches that is not linear, or the layers of a site differ in form.
    """
    found = lycoris.ranks_by_site(layout, config)
    for path, ranks in found.items():
        forms = {tuple(shapes(layout.site(path), r, config)): r for r in ranks if r}
        if len(forms) > 1:
            ways = "; ".join(f"r={r}: {', '.join(names)}" for names, r in forms.items())
            raise UserError(
                f"rank_pattern gives the layers of {path} matrices of different forms ({ways}). jaxtune stacks the "
                "layers of a module: choose ranks of one form."
            )
    return found


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """Kaiming, and W1 zero; "lycoris" has W2 zero instead, and False neither."""
    zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[config.init_weights]
    adapters = {}
    for path, ranks in plan(layout, config).items():
        site, values = layout.site(path), {}
        live = lycoris.live_ranks(ranks)
        adapted = jnp.asarray(np.array(ranks) > 0, jnp.float32)[:, None, None]
        for name, shape in shapes(site, max(ranks), config).items():
            ranked = {"_b": live[:, None, :], "_a": live[:, :, None]}.get(name[-2:], adapted)
            fan_in = np.array(ranks) if name.endswith("_a") else shape[0]
            value = lycoris.kaiming(site_key(key, f"{path}/{name}"), (len(ranks), *shape), fan_in) * ranked
            values[name] = jnp.zeros_like(value) if name in zero else value
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
        whole = shapes(site, max(ranks), config)
        values = {name: np.zeros((len(ranks), *shape), np.float32) for name, shape in whole.items()}
        for layer, (module, r) in enumerate(zip(site.modules, ranks, strict=True)):
            for name, shape in shapes(site, r, config).items() if r else ():
                _cut(name, values[name][layer], r)[:] = take(tensors, f"{module}.{name}", shape[::-1], f"rank {r}").T
        adapters[path] = _boxed(site, ranks, config, values)
    return adapters


def _boxed(site: Site, ranks: tuple[int, ...], config: Config, values: Mapping[str, Any]) -> LoKr:
    boxes = {name: box(value, site.axes[0], None, None) for name, value in values.items()}
    return LoKr(
        first={name: value for name, value in boxes.items() if name.startswith("lokr_w1")},
        second={name: value for name, value in boxes.items() if name.startswith("lokr_w2")},
        scale=lycoris.scales(site, ranks, config),
        ranks=ranks,
        rank_dropout=config.rank_dropout,
        rank_dropout_scale=config.rank_dropout_scale,
        module_dropout=config.module_dropout,
    )


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys."""
    return dict(vars(config))
