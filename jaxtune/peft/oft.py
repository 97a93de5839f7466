"""OFT: y = (x R) W, with R a rotation of blocks of x that starts at the identity.

Qiu et al. 2023 (arXiv 2306.07280) and 2025 (OFTv2, 2506.19847); equals peft's `oft.Linear`.  A block is b wide, and its
rotation comes from a skew-symmetric Q, of which PEFT stores the b(b-1)/2 values above the diagonal, row by row:

  use_cayley_neumann   R = I + 2Q + 2Q² + … + Qᵏ, a rotation as far as Q is small
  else                 R = (I - Q)(I + Q)⁻¹, exactly one

R - I is what is computed and multiplied with: near the identity, the few bits of a TPU's product would lose it.
"""

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxtune.errors import UserError
from jaxtune.layers import matmul
from jaxtune.peft.keys import check_choice, check_count, check_fraction, check_number, check_targets
from jaxtune.peft.method import (
    QUERY_VALUE,
    Fixed,
    Layout,
    Site,
    Start,
    box,
    live_mask,
    select,
    site_key,
    take,
    where_live,
)

PEFT_TYPE = "OFT"

# The patterns are of peft before 0.15, whose files may still say that they have none.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alpha_pattern": ({}, None),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({}, None),
}

SUFFIX = "oft_R.weight"


@dataclasses.dataclass(frozen=True)
class Config:
    """PEFT's keys and defaults.

    Raises:
      ValueError: a value out of range, naming the key.
    """

    r: Any = 0
    oft_block_size: Any = 32
    module_dropout: Any = 0.0
    target_modules: Any = None
    exclude_modules: Any = None
    bias: Any = "none"
    init_weights: Any = True
    layers_to_transform: Any = None
    layers_pattern: Any = None
    modules_to_save: Any = None
    coft: Any = False
    eps: Any = 6e-5
    block_share: Any = False
    use_cayley_neumann: Any = True
    num_cayley_neumann_terms: Any = 5

    def __post_init__(self):
        for key in ("r", "oft_block_size"):
            check_count(key, getattr(self, key), low=0)
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"r is {self.r} and oft_block_size is {self.oft_block_size}. One of them says how x is divided (r "
                "blocks, or blocks of that size); the other is 0."
            )
        check_fraction("module_dropout", self.module_dropout)
        check_number("eps", self.eps)
        check_count("num_cayley_neumann_terms", self.num_cayley_neumann_terms, high=64)
        check_choice("bias", self.bias, ("none", "all", "oft_only"))
        for key in ("init_weights", "coft", "block_share", "use_cayley_neumann"):
            check_choice(key, getattr(self, key), (True, False))
        check_targets(self)


@struct.dataclass
class Oft:
    """skew: Q's values [L, D, b(b-1)/2] of D blocks, or of 1 for all of them; inside the layer scan without L.

    layers: which have an adapter.  terms: of the series, None for the exact form.  eps: of coft, None without.
    """

    skew: Any
    live: Fixed | None
    layers: tuple[bool, ...] = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False)
    terms: int | None = struct.field(pytree_node=False)
    eps: float | None = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)

    def turns(self) -> Any:
        """R - I of every block [D, b, b]."""
        skew = self.skew
        if self.eps is not None:
            # The value is the projected one; the gradient passes, as PEFT's does, which projects the parameter itself.
            skew = jax.lax.stop_gradient(project(skew, self.eps)) + (skew - jax.lax.stop_gradient(skew))
        upper = jnp.zeros((skew.shape[0], self.block, self.block)).at[:, *np.triu_indices(self.block, 1)].set(skew)
        q = upper - jnp.swapaxes(upper, 1, 2)
        turns = cayley(q) if self.terms is None else series(q, self.terms)
        return where_live(self.live, turns, jnp.zeros_like(turns))

    def linear(self, x, y, w, rng):
        return matmul(turn(x, drop_blocks(self.turns(), self.dropout, rng)), w)

    def merged(self, w):
        return turn(w.T, jnp.swapaxes(self.turns(), 1, 2)).T

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        return {SUFFIX: np.asarray(self.skew[layer])} if self.layers[layer] else {}


def series(q: Any, terms: int) -> Any:
    """2Q + 2Q² + … + Qᵏ with k = terms - 1; as PEFT sums it, 3 terms are the same as 4."""
    if terms < 3:
        return 2 * q * (terms - 1)
    total, power = 2 * q, q
    for _ in range(max(terms, 4) - 3):
        power = jnp.matmul(power, q, precision="highest")
        total = total + 2 * power
    return total + jnp.matmul(power, q, precision="highest")


def cayley(q: Any) -> Any:
    """(I - Q)(I + Q)⁻¹ - I."""
    return -2 * jnp.linalg.solve(jnp.broadcast_to(jnp.eye(q.shape[-1]), q.shape) + q, q)


def turn(x: Any, turns: Any) -> Any:
    """x R [N, I] in float32, rounded to x's dtype as PEFT does, with R - I given by block; a single one serves all."""
    (N, width), b = x.shape, turns.shape[-1]
    turns, whole = jnp.broadcast_to(turns, (width // b, b, b)), x.astype(jnp.float32)
    moved = jnp.einsum("NDI,DIO->NDO", whole.reshape(N, -1, b), turns)
    return (whole + moved.reshape(N, width)).astype(x.dtype)


def drop_blocks(turns: Any, rate: float, rng: Any) -> Any:
    """Leaves a share of the blocks [D, b, b] unturned, rounded down; `rng` None: none of them."""
    D = turns.shape[0]
    if rng is None or int(rate * D) == 0:
        return turns
    dropped = jax.random.permutation(rng, D) < int(rate * D)
    return jnp.where(dropped[:, None, None], jnp.zeros_like(turns), turns)


def project(skew: Any, eps: float) -> Any:
    """COFT: every Q no longer than eps / sqrt(D)."""
    limit = eps / skew.shape[-2] ** 0.5
    length = jnp.sqrt(2 * jnp.sum(skew * skew, axis=-1, keepdims=True))
    return jnp.where(length <= limit, skew, limit * skew / jnp.maximum(length, jnp.finfo(jnp.float32).tiny))


def optimiser(inner: optax.GradientTransformation, config: Config, frozen: Any) -> optax.GradientTransformation:
    """With coft a step starts from the projected values, since PEFT projects its parameters in every forward pass."""
    if not config.coft:
        return inner

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        start = {path: project(x, config.eps) if path.endswith("/skew") else x for path, x in params.items()}
        updates, state = inner.update(updates, state, start)
        return {path: u + (start[path] - params[path]) for path, u in updates.items()}, state

    return optax.GradientTransformation(inner.init, update)


def nearest_divisor(size: int, wanted: int) -> int:
    """What PEFT takes where `wanted` does not divide a size; of two as near, the smaller."""
    return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: (abs(d - wanted), d))


def block_size(width: int, config: Config) -> int:
    return nearest_divisor(width, config.oft_block_size) if config.r == 0 else width // nearest_divisor(width, config.r)


def plan(layout: Layout, config: Config) -> dict[str, tuple[bool, ...]]:
    """{path: whether each layer has an adapter}.

    Raises:
      UserError: nothing matches, something matches that is not linear, or blocks would be 1 wide.
    """
    found = select(layout, config, QUERY_VALUE)
    for path in found:
        width = layout.site(path).shape[1]
        if block_size(width, config) < 2:
            key = "oft_block_size" if config.r == 0 else "r"
            raise UserError(
                f"{key}={getattr(config, key)} divides the {width} inputs of {path} into blocks of 1, which cannot be "
                f"turned. {'Increase' if config.r == 0 else 'Decrease'} it."
            )
    return found


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """Zeros; or N(0, 0.1²)."""
    adapters = {}
    for path, layers in plan(layout, config).items():
        shape = (len(layers), *_shape(layout.site(path), config))
        skew = jnp.zeros(shape) if config.init_weights else 0.1 * jax.random.normal(site_key(key, path), shape)
        adapters[path] = _boxed(layout.site(path), layers, config, skew)
    return adapters


def from_peft(layout: Layout, config: Config, tensors: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """{path: adapter} from PEFT's tensors.

    Raises:
      KeyError, UserError: as `method.take`.
    """
    adapters = {}
    for path, layers in plan(layout, config).items():
        site = layout.site(path)
        skew = np.zeros((len(layers), *_shape(site, config)), np.float32)
        for layer, (module, adapted) in enumerate(zip(site.modules, layers, strict=True)):
            if adapted:
                skew[layer] = take(tensors, f"{module}.{SUFFIX}", skew.shape[1:])
        adapters[path] = _boxed(site, layers, config, skew)
    return adapters


def _shape(site: Site, config: Config) -> tuple[int, int]:
    b = block_size(site.shape[1], config)
    return 1 if config.block_share else site.shape[1] // b, b * (b - 1) // 2


def _boxed(site: Site, layers: tuple[bool, ...], config: Config, skew: Any) -> Oft:
    return Oft(
        skew=box(skew, site.axes[0], None, None),
        live=live_mask(layers),
        layers=layers,
        block=block_size(site.shape[1], config),
        terms=config.num_cayley_neumann_terms if config.use_cayley_neumann else None,
        eps=config.eps if config.coft else None,
        dropout=config.module_dropout,
    )


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys."""
    return dict(vars(config))
