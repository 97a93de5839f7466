"""P-tuning: the embeddings of virtual tokens are what a small network, an MLP or an LSTM, makes of smaller beginnings.

Liu et al. 2021 (arXiv 2103.10385); equals peft's `PromptEncoder`.  The network trains and stays in the run's
checkpoints; a PEFT file has only what came out of it.  So such a file goes on as prompt tuning.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxtune.layers import constrain
from jaxtune.peft import prompt, prompt_tuning
from jaxtune.peft.keys import check_choice, check_count, check_fraction
from jaxtune.peft.method import Layout, Start, box

PEFT_TYPE = "P_TUNING"
OWN_NAMES, PREFIX, OUR_KEYS = (prompt.NAME,), prompt.PREFIX, prompt.OUR_KEYS
NEUTRAL: dict[str, tuple[Any, ...]] = {}


@dataclasses.dataclass(frozen=True)
class Config(prompt.PromptConfig):
    """PEFT's keys and defaults.  An MLP reads neither `encoder_num_layers` nor `encoder_dropout`, as in PEFT.
    encoder_hidden_size: None is the model's width."""

    encoder_reparameterization_type: Any = "MLP"
    encoder_hidden_size: Any = None
    encoder_num_layers: Any = 2
    encoder_dropout: Any = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_choice("encoder_reparameterization_type", self.encoder_reparameterization_type, ("MLP", "LSTM"))
        if self.encoder_hidden_size is not None:
            check_count("encoder_hidden_size", self.encoder_hidden_size)
        check_count("encoder_num_layers", self.encoder_num_layers, high=64)
        check_fraction("encoder_dropout", self.encoder_dropout)


@struct.dataclass
class Affine:
    """y = x w + b: w [in, out], b [out]."""

    w: Any
    b: Any

    def __call__(self, x):
        return jnp.matmul(x, self.w, precision="highest") + self.b[None]


@struct.dataclass
class Cell:
    """One direction of one LSTM layer: what the input x and the last output h give to the gates i, f, g, o (each of
    size h, behind each other)."""

    x: Affine
    h: Affine

    def __call__(self, x, backwards: bool):
        """[P, in] to [P, h]."""
        size = self.h.w.shape[0]
        # Gathered here, once, where weights are split over devices, and not at every turn of the loop.
        of_x, weight = constrain(self.x(x), None, None), constrain(self.h.w, None, None)
        of_h = Affine(weight, constrain(self.h.b, None))

        def step(carry, from_x):
            last, memory = carry
            i, f, g, o = jnp.split(from_x + of_h(last), 4, axis=-1)
            memory = jax.nn.sigmoid(f) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
            last = jax.nn.sigmoid(o) * jnp.tanh(memory)
            return (last, memory), last[0]

        start = jnp.zeros((1, size), x.dtype), jnp.zeros((1, size), x.dtype)
        return jax.lax.scan(step, start, of_x[:, None], reverse=backwards)[1]


@struct.dataclass
class Encoder:
    """embedding [P, D]; lstm: (forwards, backwards) of each layer, none for an MLP; head: its layers, ReLU between."""

    embedding: Any
    lstm: tuple[tuple[Cell, Cell], ...]
    head: tuple[Affine, ...]
    dropout: float = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False)

    def rows(self, rng=None):
        """The network's output [P, D]; dropout between the layers of an LSTM where there is an `rng`."""
        x = self.embedding
        for layer, (forwards, backwards) in enumerate(self.lstm):
            if layer and self.dropout and rng is not None:
                keep = jax.random.bernoulli(jax.random.fold_in(rng, layer), 1 - self.dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.dropout), 0.0)
            x = jnp.concatenate([forwards(x, False), backwards(x, True)], axis=-1)
        for layer in self.head[:-1]:
            x = jax.nn.relu(layer(x))
        return self.head[-1](x)

    def folded(self):
        return prompt.Prompt(self.rows(), self.scale)

    def to_peft(self) -> dict[str, np.ndarray]:
        return {prompt.NAME: np.asarray(self.rows())}


plan, virtual, from_peft = prompt.plan, prompt.virtual, prompt.from_peft


def continues_as(config: Config) -> tuple[str, Any]:
    """Prompt tuning: the file has no network."""
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(prompt.PromptConfig)}
    return "prompt_tuning", prompt_tuning.Config(**sizes)


def init(key: jax.Array, layout: Layout, config: Config, start: Start) -> dict[str, Any]:
    """{"prompt": adapter}, fresh, with torch's first values: N(0, 1) for the embedding, U(±1/√in) for a layer's weight
    and bias, U(±1/√h) for an LSTM's."""
    plan(layout, config)
    width, hidden = layout.width, config.encoder_hidden_size or layout.width
    keys = iter(jax.random.split(key, 8 + 4 * config.encoder_num_layers))
    embedding = box(jax.random.normal(next(keys), (prompt.count_of(layout, config), width)), None, "embed")
    lstm, sizes = (), (width, hidden, hidden, width)
    if config.encoder_reparameterization_type == "LSTM":
        inputs = [width] + [2 * hidden] * (config.encoder_num_layers - 1)
        lstm = tuple((_cell(next(keys), size, hidden), _cell(next(keys), size, hidden)) for size in inputs)
        sizes = (2 * hidden, 2 * hidden, width)
    head = tuple(affine(next(keys), *pair) for pair in itertools.pairwise(sizes))
    return {"prompt": Encoder(embedding, lstm, head, config.encoder_dropout, prompt.scale_of(layout, config))}


def _cell(key: jax.Array, size: int, hidden: int) -> Cell:
    of_x, of_h = jax.random.split(key)
    return Cell(affine(of_x, size, 4 * hidden, hidden), affine(of_h, hidden, 4 * hidden, hidden))


def affine(key: jax.Array, size: int, out: int, fan: int | None = None) -> Affine:
    """torch's `Linear` at the start: weight and bias U(±1/√fan), of `size` inputs where no other is given."""
    of_w, of_b = jax.random.split(key)
    bound = (fan or size) ** -0.5
    w = jax.random.uniform(of_w, (size, out), minval=-bound, maxval=bound)
    return Affine(box(w, None, "embed"), box(jax.random.uniform(of_b, (out,), minval=-bound, maxval=bound), "embed"))


def to_config(layout: Layout, config: Config, adapters: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json's keys."""
    values = prompt.to_config(layout, config, adapters)
    return values | {"encoder_hidden_size": config.encoder_hidden_size or layout.width}
