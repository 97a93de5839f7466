"""How a device goes through tokens and vocabulary: chosen by the platform and the shapes, by no option.

N tokens, D width, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jaxtune.mesh import platform, spec
from jaxtune.quant.box import Quantised

# Tokens whose logits exist at one time on one device.  With fewer than about 500 a product waits for the table's bytes
# on TPUs and GPUs (a v5e does 240 operations while it reads one byte); on a CPU 64 are enough.  More cost memory, and
# where few positions are trained on the last turn is mostly empty.
CHUNK_TOKENS = 512
CHUNK_TOKENS_CPU = 256

# Words of a block where the vocabulary goes in blocks: 512 x 16384 logits are 32 MiB.
BLOCK_WORDS = 16384


class How(NamedTuple):
    """softcap, z_loss: of the loss.  chunk: tokens at a time.  words: this device's part of the vocabulary, and block:
    how many of them at a time.  rows, vocab, width: the axes of the mesh (with more than one device) over which tokens,
    the table's rows and its columns are split; () where they are whole."""

    softcap: float | None
    z_loss: float
    chunk: int
    words: int
    block: int
    rows: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    width: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        return -(-self.words // self.block)


def choose(tokens: int, table: Any, softcap: float | None, z_loss: float = 0.0) -> How:
    """For `tokens` (a multiple of `shards`) and a table [V, D] or its box, on the devices of `jax.set_mesh`.

    On TPUs, whose memory is short, the vocabulary goes in blocks: neither the gathered table nor its gradient nor the
    logits of all words are ever whole, for a third product, since the gradient needs a second pass.  Elsewhere speed is
    short: one block, and the gradient is made with the loss.
    """
    (V, D), mesh = table.shape, jax.sharding.get_abstract_mesh()
    axes: list[tuple[str, ...]] = [(), (), ()]
    if not mesh.empty:
        places = *spec(mesh, ("batch",), (tokens,)), *spec(mesh, ("vocab", "embed"), (V, D))
        axes = [tuple(name for name in names(place) if mesh.shape[name] > 1) for place in places]
    rows, vocab, width = axes
    words = V // ways(mesh, vocab)
    if isinstance(table, Quantised):
        width = ()  # its codes go to every device: they are fewer bytes than one gathered block after the other
    on = platform()
    most = CHUNK_TOKENS_CPU if on == "cpu" else CHUNK_TOKENS
    chunk = even(tokens // ways(mesh, rows), most, 8)
    block = even(words, BLOCK_WORDS, 128) if on == "tpu" else words
    return How(softcap, z_loss, chunk, words, block, rows, vocab, width)


def even(count: int, most: int, unit: int) -> int:
    """The size of the fewest pieces of at most `most` that hold `count`: the last is about as full as the others.

    A multiple of `unit` (what a TPU's registers hold) where there are several.
    """
    pieces = -(-count // most)
    return count if pieces <= 1 else min(most, -(-count // (pieces * unit)) * unit)


def shards() -> int:
    """Into how many pieces tokens are split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else ways(mesh, names(spec(mesh, ("batch",), (mesh.size,))[0]))


def ways(mesh: Any, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def names(place: Any) -> tuple[str, ...]:
    """The axes in one place of a PartitionSpec."""
    return (place,) if isinstance(place, str) else tuple(place or ())


def specs(how: How) -> dict[str, PartitionSpec]:
    """Where tokens, the table and a number are."""
    return {
        "tokens": PartitionSpec(how.rows or None),
        "table": PartitionSpec(how.vocab or None, how.width or None),
        "whole": PartitionSpec(),
    }
