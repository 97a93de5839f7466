"""Floating-point operations of a training step, counted from shapes: two for a product's multiplication and addition.

The convention of MFU: 2P forward and 2P for the gradients of activations, and 2P more for those of the weights that
train, so 4P with adapters and 6P for full tuning; attention where it looks (causal, within windows); what is computed
again to save memory is not in it.  P are the linear layers and the head: rows of the embedding are looked up.

Gemma 2 2b with LoRA of rank 8 on its seven projections, rows of 2048: 11.17 GFLOP a token, 16.3 in full tuning.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.data.seq2seq import Lengths
from jaxtune.hf.base import Base


@dataclasses.dataclass(frozen=True)
class Flops:
    """What one row of the given length costs, forward and backward, in FLOP.

    layers, attention, adapters: of its tokens.  head: of its targets, at most all of the decoder's tokens.
    again: what is computed a second time: by remat, and attention's scores.  tokens: in the row, both sides'.
    """

    layers: float
    attention: float
    adapters: float
    head: float
    again: float
    tokens: int

    @property
    def row(self) -> float:
        """Of MFU."""
        return self.layers + self.attention + self.adapters + self.head

    @property
    def per_token(self) -> float:
        return self.row / self.tokens

    @property
    def hardware(self) -> float:
        """What the chip computes."""
        return self.row + self.again


@dataclasses.dataclass(frozen=True)
class Stack:
    """One stack of layers over `tokens` of a row.

    linear: weights that each token meets; crossing: those that each source token meets besides (keys and values of the
    attention to the encoder).  looks: (keys that a query sees on average) of each attention.
    """

    tokens: int
    linear: int
    crossing: int
    looks: tuple[float, ...]


def flops(
    base: Base, trainable: Mapping[str, Any], length: int | Lengths, remat: str = "none", *, blocks: bool = False
) -> Flops:
    """Of one row.

    Args:
      trainable: {path: shape} of what trains (`Adapted.trainable`).  length: of the row, all of it real tokens.
      blocks: whether the vocabulary goes in blocks (TPUs), for which logits are made twice.
    """
    heads = base.model.config.heads * base.model.config.head_dim
    whole = stacks(base, length)
    source = length.source if isinstance(length, Lengths) else 0
    inner = {path: x for path, x in trainable.items() if not of_head(base, path)}
    # Gradients go down to the lowest layer that trains: all of a scan's, or none.
    backward = bool(inner)
    passes = 2 if backward else 1
    forward = sum((2.0 * (s.linear * s.tokens + s.crossing * source) for s in whole), 0.0)
    attention = sum((4.0 * heads * s.tokens * look for s in whole for look in s.looks), 0.0)
    weights = sum((2.0 * x.size * met_by(path, length) for path, x in inner.items() if is_kernel(path)), 0.0)
    adapters = sum(
        (6.0 * x.size * met_by(path, length) for path, x in inner.items() if is_adapter_of_kernel(path, x)), 0.0
    )
    head = 2.0 * base.model.config.vocab_size * base.model.config.width * whole[-1].tokens
    tied = base.model.config.tied and "params/embed/table" in trainable
    trains_head = len(inner) < len(trainable) or tied
    # Without a norm behind it nothing needs what the last product of a layer gives.
    last = [
        row
        for row in base.rows
        if row.path.endswith("mlp/down/kernel") and not getattr(base.model.config, "post_norms", False)
    ]
    products = forward + adapters / 3 - sum(2.0 * math.prod(row.shape) * met_by(row.path, length) for row in last)
    # In `dots` what a linear layer gives is kept too, with its adapter's part, but not what is inside: x A.
    inside = sum((2.0 * x.size * met_by(path, length) for path, x in inner.items() if path.endswith("/kernel/a")), 0.0)
    # A decoder's attention makes its scores again whenever it goes back, an encoder-decoder's only where remat does.
    scores = attention / 2
    kept = scores if isinstance(length, int) else 0.0
    again = {"none": kept, "dots": inside + scores, "attn_out": products + scores}.get(
        remat, products + attention + kept
    )
    return Flops(
        layers=forward * passes + weights,
        # Its backward pass has four products for the forward's two.
        attention=attention * (3 if backward else 1),
        adapters=adapters,
        head=head * (1 + backward + trains_head),
        again=again * backward + head * blocks,
        tokens=sum(s.tokens for s in whole),
    )


def stacks(base: Base, length: int | Lengths) -> list[Stack]:
    """The stacks of a model over a row, the one that has the head last."""
    kernels = {row.path: row for row in base.rows if is_kernel(row.path)}
    c = base.model.config
    if not isinstance(length, Lengths):
        linear = sum(math.prod(row.shape) for row in kernels.values())
        return [Stack(length, linear, 0, tuple(seen(length, window) for window in c.windows))]
    crossing = [p for p in kernels if "/cross/k/" in p or "/cross/v/" in p]
    source, target = length.source, length.target
    of = {name: [p for p in kernels if p.startswith(name) and p not in crossing] for name in ("encoder", "decoder")}
    linear = {name: sum(math.prod(kernels[p].shape) for p in paths) for name, paths in of.items()}
    decoder = (*(seen(target, None),) * c.layers, *(float(source),) * c.layers)
    return [
        Stack(source, linear["encoder"], 0, (float(source),) * c.encoder_layers),
        Stack(target, linear["decoder"], sum(math.prod(kernels[p].shape) for p in crossing), decoder),
    ]


def met_by(path: str, length: int | Lengths) -> int:
    """How many tokens of a row a linear layer has: of an encoder-decoder's the source's or the target's."""
    if isinstance(length, int):
        return length
    crossing = "/cross/k/" in path or "/cross/v/" in path
    return length.source if crossing or "encoder/" in path else length.target


def seen(length: int, window: int | None) -> float:
    """How many keys a query sees on average: all at and before it, no more than `window`."""
    return float(seen_total(np.float64(length), window)) / length


def seen_total(length: Any, window: int | None) -> Any:
    """The sum over a row's queries of the keys that each sees; of several rows by their lengths."""
    w = length if window is None else np.minimum(window, length)
    return w * (w + 1) / 2 + (length - w) * w


def is_kernel(path: str) -> bool:
    """A linear layer's weight, by the path of a parameter or of a leaf."""
    return path.endswith("/kernel")


def is_adapter_of_kernel(path: str, leaf: Any) -> bool:
    """A matrix of an adapter at a linear layer.  (What an adapter multiplies with and does not train, as VeRA's
    projections, is not counted: some methods' MFU is a little too low.)"""
    return path.startswith("adapters/") and "/kernel/" in path and leaf.ndim >= 3


def of_head(base: Base, path: str) -> bool:
    """Whether a trained leaf is the head's alone: its gradient needs no layer."""
    return path.startswith("adapters/lm_head/") or (path == "params/lm_head/table")
