"""HBM of one chip in a training step, by part, from shapes alone.

What is held from step to step (weights, what trains, the optimiser, the batch) is exact: the arrays' own shapes and
shardings.  What lives within a step is the compiler's to decide; the formulas here say what has to be there at its
fullest moment, with a few factors fitted to what compilers reserve (`compiled.json`, `python -m jaxtune.plan.refresh`).

N tokens of one chip and micro-batch, D width, F hidden, H heads times their size, V vocabulary, L layers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxtune.data.seq2seq import Lengths
from jaxtune.hf.base import Base
from jaxtune.loss.how import BLOCK_WORDS, CHUNK_TOKENS, even
from jaxtune.mesh import AnyMesh
from jaxtune.plan.abstract import Laid, bytes_on_chip
from jaxtune.plan.flops import is_adapter_of_kernel, is_kernel

# How many arrays of a layer's kind live together while it is computed again and differentiated: [N, D], [N, F] and
# [N, H], of four bytes, as the sums of products are.  An adapter's products are beside those of its kernel, and of the
# first there are more where `tensor` sums them over chips.  Fitted, as is what follows.
WORKING, SUMMED = {"D": 1.5, "F": 3.15, "H": 2.5}, 5.0
# Of a layer's saved arrays without remat, in the activations' dtype.
SAVED = {"D": 8.0, "F": 5.0, "H": 5.0}
# Copies of a layer's kernels that fsdp puts together or quantisation turns back, in the activations' dtype, and of the
# largest of them in float32 while four bits become numbers.
GATHERED, DECODED = 1.15, 1.65
# Logits of a block, and what is made of them before they go: float32 logits, probabilities, the gradient.
LOGITS = 2.0


@dataclasses.dataclass(frozen=True)
class Held:
    """What one chip holds from step to step, in bytes.  trained: the weights or adapters that train."""

    weights: int
    trained: int
    optimiser: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step's temporary memory depends on.  rows: of a micro-batch on one chip.  trainable: what
    trains, by path."""

    base: Base
    mesh: AnyMesh
    rows: int
    length: int | Lengths
    remat: str
    dtype: str
    platform: str
    turns: int
    trainable: Mapping[str, Any]

    @property
    def trained(self) -> int:
        """Bytes of what trains."""
        return bytes_on_chip(dict(self.trainable))

    @property
    def tokens(self) -> int:
        """N: of the longer stack, whose layers are at work."""
        return self.rows * self.longest

    @property
    def longest(self) -> int:
        return self.length if isinstance(self.length, int) else max(self.length.source, self.length.target)

    @property
    def targets(self) -> int:
        return self.rows * (self.length if isinstance(self.length, int) else self.length.target)

    @property
    def item(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def tensor(self) -> int:
        return self.mesh.shape["tensor"]

    @property
    def fsdp(self) -> int:
        return self.mesh.shape["fsdp"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip by part.  `layer` (with `gathers`) and `loss` are not there at a time: the larger counts."""

    weights: int
    trained: int
    optimiser: int
    batch: int
    gradients: int
    activations: int
    layer: int
    gathers: int
    loss: int

    @property
    def total(self) -> int:
        held = self.weights + self.trained + self.optimiser + self.batch
        return held + self.gradients + self.activations + max(self.layer + self.gathers, self.loss)

    def parts(self) -> dict[str, int]:
        """{part: bytes}, which add up to the total: of `layer` and `loss` the one that counts."""
        values = dataclasses.asdict(self)
        for name in ("loss",) if self.layer + self.gathers >= self.loss else ("layer", "gathers"):
            del values[name]
        return values


def held(laid: Laid) -> Held:
    """Exact: every argument of the step, by its own shape and sharding."""
    return Held(
        weights=bytes_on_chip(laid.frozen),
        trained=bytes_on_chip(laid.state.trainable),
        optimiser=bytes_on_chip(laid.state.opt_state),
        batch=bytes_on_chip(laid.batch),
    )


def predict(has: Held, work: Work) -> Memory:
    return Memory(
        **dataclasses.asdict(has),
        gradients=gradients(work),
        activations=activations(work),
        layer=layer(work),
        gathers=gathers(work),
        loss=loss(work),
    )


def gradients(work: Work) -> int:
    """float32 as what trains: the sum over micro-batches, and one micro-batch's own where there are several."""
    return work.trained * (2 if work.turns > 1 else 1)


def activations(work: Work) -> int:
    """What the forward pass leaves for the backward pass, of all layers.

    full: each layer's input, which with offload lies in the host's memory.  attn_out: besides, what attention gives.
    dots: every product's result.  none: what SAVED counts.
    """
    wide, hidden, heads = sizes(work)
    each = {
        "full": wide * work.item,
        "attn_out": (wide + heads) * work.item,
        "offload": 0.0,
        "dots": (3 * wide + 2 * hidden + 2 * heads) * work.item,
        "none": (SAVED["D"] * wide + SAVED["F"] * hidden + SAVED["H"] * heads) * work.item,
    }[work.remat]
    return int(each * layers(work.base) * work.tokens)


def layer(work: Work) -> int:
    """One layer computed again and differentiated.  Kernels that train have their gradients here before each chip has
    its share of them, and so have tables."""
    wide, hidden, heads = sizes(work)
    beside = 2 if any(is_adapter_of_kernel(path, x) for path, x in work.trainable.items()) else 1
    own = beside * (WORKING["D"] * wide + WORKING["F"] * hidden + WORKING["H"] * heads)
    own += SUMMED * wide * (work.tensor > 1)
    whole = sum(
        math.prod(x.shape[1:] if is_kernel(path) else x.shape)
        for path, x in work.trainable.items()
        if path.startswith("params/") and (is_kernel(path) or path.endswith("/table"))
    )
    return int(own * 4 * work.tokens + (whole * 4 / work.tensor if work.fsdp > 1 else 0))


def sizes(work: Work) -> tuple[float, float, float]:
    """(D, F, H) of one chip: `tensor` splits hidden units and heads."""
    c = work.base.model.config
    return float(c.width), c.hidden / work.tensor, c.heads * c.head_dim / work.tensor


def layers(base: Base) -> int:
    return base.model.config.layers + getattr(base.model.config, "encoder_layers", 0)


def gathers(work: Work) -> int:
    """Frozen weights that fsdp splits are put together for their use, those of a layer at a time; quantised ones are
    turned into the activations' dtype whether they are split or not."""
    rows = [row for row in work.base.rows if is_kernel(row.path)]
    coded = [row for row in rows if work.base.quantises(row.path)]
    moved = rows if work.fsdp > 1 else coded
    four_bits = work.base.quant is not None and work.base.quant.kind != "int8"
    of_layer = sum(math.prod(row.shape[1:]) for row in moved)
    largest = max((math.prod(row.shape[1:]) for row in coded), default=0) if four_bits else 0
    return int((GATHERED * of_layer * work.item + DECODED * largest * 4) / work.tensor)


def loss(work: Work) -> int:
    """Logits of one chunk of tokens (TPUs: and of one block of the vocabulary), the part of the head that fsdp puts
    together for it, and the gradient of the hidden states, in float32 and as it goes on."""
    c = work.base.model.config
    words = c.vocab_size // work.tensor
    if work.platform == "tpu":
        words = even(words, BLOCK_WORDS, 128)
    table = words * c.width if work.fsdp > 1 else 0
    logits = even(work.targets, CHUNK_TOKENS, 8) * words
    return int(logits * 4 * LOGITS + table * work.item + work.targets * c.width * (4 + work.item))
