"""BOFT: y = g ∘ ((x R) W), with R a product of rotations of blocks, each of the inputs in another order (a butterfly),
and a trained gain g of every output.

Liu et al. 2023 (arXiv 2311.06243); equals peft's `boft.Linear`.  R = M_{F-1} … M_0 and M_i = P_i B_i P_iᵀ: B_i turns
blocks b wide by the Cayley transform of the skew part of what is stored, and P_i puts the even half-blocks of every 2^i
blocks before the odd ones.

Without its CUDA extension, peft makes one factor, silently, and still writes the config's number.  The tensors are
believed here, and what is exported says how many there are.
"""

import dataclasses
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.errors import UserError
from jaxtune.layers import matmul
from jaxtune.peft.keys import check_choice, check_count, check_fraction, check_targets
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
from jaxtune.peft.oft import cayley, drop_blocks, turn

PEFT_TYPE = "BOFT"

NEUTRAL: dict[str, tuple[Any, ...]] = {"fan_in_fan_out": (False,)}


@dataclasses.dataclass(frozen=True)
class Config:
    """PEFT's keys and defaults.

    Raises:
      ValueError: a value out of range, naming the key.
    """

    boft_block_size: Any = 4
    boft_block_num: Any = 0
    boft_n_butterfly_factor: Any = 1
    target_modules: Any = None
    exclude_modules: Any = None
    boft_dropout: Any = 0.0
    bias: Any = "none"
    modules_to_save: Any = None
    init_weights: Any = True
    layers_to_transform: Any = None
    layers_pattern: Any = None

    def __post_init__(self):
        for key in ("boft_block_size", "boft_block_num"):
            check_count(key, getattr(self, key), low=0)
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ValueError(
                f"boft_block_size is {self.boft_block_size} and boft_block_num is {self.boft_block_num}. One of them "
                "says how x is divided; the other is 0."
            )
        check_count("boft_n_butterfly_factor", self.boft_n_butterfly_factor, high=16)
        check_fraction("boft_dropout", self.boft_dropout)
        check_choice("bias", self.bias, ("none", "all", "boft_only"))
        check_choice("init_weights", self.init_weights, (True, False))
        check_targets(self)


@struct.dataclass
class Boft:
    """raw [L, F, D, b, b]: F factors of D blocks; gain [L, out].  Inside the layer scan without L.  layers: which have
    an adapter."""

    raw: Any
    gain: Any
    live: Fixed | None
    layers: tuple[bool, ...] = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False)

    def turns(self) -> Any:
        """B - I of every factor [F, D, b, b]."""
        turns = cayley((self.raw - jnp.swapaxes(self.raw, -1, -2)) / 2)
        return where_live(self.live, turns, jnp.zeros_like(turns))

    def gains(self) -> Any:
        return where_live(self.live, self.gain, jnp.ones_like(self.gain))[None]

    def linear(self, x, y, w, rng):
        factors = self.dropped(self.turns(), rng)
        return matmul(through(x, reversed(list(enumerate(factors)))), w) * self.gains()

    def dropped(self, turns: Any, rng: Any) -> Any:
        """Blocks of one factor, chosen anew every time, stay unturned."""
        if rng is None or not self.dropout:
            return turns
        which, blocks = jax.random.split(rng)
        hit = jax.random.randint(which, (), 0, turns.shape[0]) == jnp.arange(turns.shape[0])
        less = jax.vmap(lambda factor: drop_blocks(factor, self.dropout, blocks))(turns)
        return jnp.where(hit[:, None, None, None], less, turns)

    def merged(self, w):
        return through(w.T, enumerate(jnp.swapaxes(self.turns(), -1, -2))).T * self.gains()

    def to_peft(self, site: Site, layer: int) -> dict[str, np.ndarray]:
        if not self.layers[layer]:
            return {}
        return {"boft_R": np.asarray(self.raw[layer]), "boft_s": np.asarray(self.gain[layer])[:, None]}


def through(x: Any, factors: Iterable[tuple[int, Any]]) -> Any:
    """x [N, I] times P_i B_i P_iᵀ of every (i, B_i - I), in that order."""
    for i, turns in factors:
        x = reorder(turn(reorder(x, i, turns.shape[-1], back=True), turns), i, turns.shape[-1])
    return x


def reorder(x: Any, i: int, b: int, back: bool = False) -> Any:
    """The columns of x by the permutation P_i, or back: in groups of 2^i blocks, even halves before odd ones."""
    if i == 0:
        return x
    pairs = (2, 2**i) if back else (2**i, 2)
    return jnp.swapaxes(x.reshape(x.shape[0], -1, *pairs, b // 2), 2, 3).reshape(x.shape)


def plan(layout: Layout, config: Config) -> dict[str, tuple[bool, ...]]:
    """{path: whether each layer has an adapter}.

    Raises:
      UserError: nothing matches, something matches that is not linear, or blocks do not divide its inputs.
    """
    found = select(layout, config, QUERY_VALUE)
    for path in found:
        width, key = layout.site(path).shape[1], "boft_block_size" if config.boft_block_size else "boft_block_num"
        value, group = getattr(config, key), 2 ** (config.boft_n_butterfly_factor - 1)
        if width % value:
            raise UserError(f"{key}={value} does not divide the {width} inputs of {path}.")
        D, b = _blocks(width, config)
        if group > 1 and (D % group or b % 2):
            raise UserError(
                f"{path} has {D} blocks of {b}. boft_n_butterfly_factor={config.boft_n_butterfly_factor} needs a "
                f"multiple of {group} blocks, of an even size."
            )
    return found


def _blocks(width: int, config: Config) -> tuple[int, int]:
    """(number, size) of the blocks."""
    D = config.boft_block_num or width // config.boft_block_size
    return D, width // D


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """No turn and a gain of 1; or both with N(0, 0.1²) about it."""
    adapters = {}
    for path, layers in plan(layout, config).items():
        site, keys = layout.site(path), jax.random.split(site_key(key, path))
        shapes = _shapes(site, config)
        spread = 0.0 if config.init_weights else 0.1
        raw, gain = (spread * jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
        adapters[path] = _boxed(site, layers, config, raw, 1 + gain)
    return adapters


def from_peft(layout: Layout, config: Config, tensors: MutableMapping[str, np.ndarray]) -> dict[str, Any]:
    """{path: adapter} from PEFT's tensors.

    Raises:
      KeyError, UserError: as `method.take`.
    """
    if all(value.shape[:1] == (1,) for name, value in tensors.items() if name.endswith(".boft_R")):
        config = dataclasses.replace(config, boft_n_butterfly_factor=1)
    adapters = {}
    for path, layers in plan(layout, config).items():
        site = layout.site(path)
        shapes = _shapes(site, config)
        raw, gain = np.zeros(shapes[0], np.float32), np.ones(shapes[1], np.float32)
        for layer, (module, adapted) in enumerate(zip(site.modules, layers, strict=True)):
            if adapted:
                raw[layer] = take(tensors, f"{module}.boft_R", raw.shape[1:])
                gain[layer] = take(tensors, f"{module}.boft_s", (gain.shape[1], 1))[:, 0]
        adapters[path] = _boxed(site, layers, config, raw, gain)
    return adapters


def _shapes(site: Site, config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    (L, rows, columns), F = site.shape, config.boft_n_butterfly_factor
    D, b = _blocks(rows, config)
    return (L, F, D, b, b), (L, columns)


def _boxed(site: Site, layers: tuple[bool, ...], config: Config, raw: Any, gain: Any) -> Boft:
    over = site.axes[0]
    return Boft(
        raw=box(raw, over, None, None, None, None),
        gain=box(gain, over, site.axes[2]),
        live=live_mask(layers),
        layers=layers,
        dropout=config.boft_dropout,
    )


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys, with the number of factors that there are."""
    factors = {a.raw.shape[1] for a in adapters.values() if isinstance(a, Boft)} or {config.boft_n_butterfly_factor}
    return {**vars(config), "boft_n_butterfly_factor": factors.pop()}
