"""The least time that a step can take on a chip, and what keeps it from being less: a bound, not a promise.

Every resource is as busy as it has to be and all of them work at a time; the slowest is the bound.  Good training loops
reach 40 to 55 % of the products' bound.
"""

import math
from typing import NamedTuple

from jaxtune.mesh import batch_shards
from jaxtune.plan.chips import Chip
from jaxtune.plan.flops import Flops, is_kernel
from jaxtune.plan.memory import Held, Work, layers

# Arrays of a layer that go through memory and back, in units of [N, D] and [N, F] of the activations' dtype, forward
# and backward: norms, rotations, activations between the products, which compilers only partly fuse.
TRAFFIC = {"D": 24.0, "F": 14.0}


class Bound(NamedTuple):
    """Seconds of a step by resource (`compute`, `memory`, `network`, `host`), and the one that binds."""

    seconds: dict[str, float]
    tokens: int

    @property
    def binds(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def step(self) -> float:
        return max(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step


def bound(chip: Chip, chips: int, one_row: Flops, has: Held, work: Work, *, offload: bool) -> Bound:
    """Of a whole step on so many chips.

    Args:
      one_row: of a row of `work.length`.  offload: whether the optimiser's state lies in the host's memory; then
        `has.optimiser` is none of it.
    """
    rows = work.rows * work.turns * batch_shards(work.mesh)
    seconds = {
        "compute": one_row.hardware * rows / chips / chip.flops(work.dtype),
        "memory": traffic(has, work) / chip.bandwidth,
        "network": exchanged(work) / (chip.link * chip.ports(chips)) if chips > 1 else 0.0,
        "host": on_host(work, offload) / chip.host,
    }
    return Bound(seconds, one_row.tokens * rows)


def on_host(work: Work, offload: bool) -> float:
    """Bytes to and from the host's memory: two float32 numbers for each that trains, both ways; layers' inputs."""
    inputs = work.tokens * work.base.model.config.width * work.item * layers(work.base) * work.turns
    return 4.0 * work.trained * offload + 2.0 * inputs * (work.remat == "offload")


def traffic(has: Held, work: Work) -> float:
    """Bytes to and from a chip's memory: every weight once a pass (written too where it was gathered), activations, and
    what trains with its optimiser, read and written."""
    c = work.base.model.config
    passes = 2 + (work.remat != "none")
    gathered = work.fsdp > 1
    weights = passes * linear_bytes(work) / work.tensor * (2 if gathered else 1)
    moved = (TRAFFIC["D"] * c.width + TRAFFIC["F"] * c.hidden / work.tensor) * work.item
    acts = moved * layers(work.base) * work.tokens
    return work.turns * (weights + acts) + 3.0 * (has.trained + has.optimiser)


def exchanged(work: Work) -> float:
    """Bytes that a chip receives in a step: weights that fsdp splits, put together forward and backward; sums of the
    trained leaves' gradients; of a tensor-parallel layer two sums of its activations forward and two backward."""
    fsdp, tensor = work.fsdp, work.tensor
    repeats = batch_shards(work.mesh)
    weights = 2.0 * linear_bytes(work) / tensor * (fsdp - 1) / fsdp * work.turns
    gradients = 2.0 * work.trained * (repeats - 1) / repeats
    again = 4 + 2 * (work.remat == "full")
    sums = 2.0 * (tensor - 1) / tensor * work.tokens * work.base.model.config.width * work.item
    return weights + gradients + again * layers(work.base) * sums * work.turns


def linear_bytes(work: Work) -> int:
    """Of all linear layers in the dtype that they are multiplied in, and the table of the head."""
    c = work.base.model.config
    kernels = sum(math.prod(row.shape) for row in work.base.rows if is_kernel(row.path))
    return (kernels + c.vocab_size * c.width) * work.item
