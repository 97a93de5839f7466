"""Before a run loads a weight: whether the accelerators that are here have room for it, and how fast they could be.

On CPUs, and on chips that are not in the table, nothing is said.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune.data.seq2seq import Lengths
from jaxtune.errors import UserError
from jaxtune.hf.base import Base
from jaxtune.plan import flops, memory, search
from jaxtune.plan.chips import GIB, chip_of_kind
from jaxtune.plan.report import remedy

# Refused is only what needs so much more than there is: TPUs' predictions are within a tenth of what they reserve.
SURE = 1.1


class Speed(NamedTuple):
    """What a step is worth in FLOP, for MFU, and the peak of all devices in FLOP/s (None: not known).

    body, head: of a token and of a target; pair: of a query and a key that it sees, in one layer.  windows: of the
    layers.  encoder_layers: in which all see all, and which every layer of the decoder sees.
    """

    body: float
    head: float
    pair: float
    windows: tuple[int | None, ...]
    encoder_layers: int
    peak: float | None
    chips: int

    def of(self, batch: Mapping[str, np.ndarray]) -> int:
        """FLOP of a batch's real tokens, each segment by its own length; 0 where there is no peak to compare with."""
        if self.peak is None:
            return 0
        own = lengths(batch["segment_ids"])
        tokens, targets = own.sum(), (batch["weights"] != 0).sum()
        pairs = sum(n * flops.seen_total(own, window).sum() for window, n in Counter(self.windows).items())
        if self.encoder_layers:
            source = lengths(batch["source_segment_ids"])
            tokens += source.sum()
            cross = (source * own).sum() if len(source) == len(own) else source.sum() * own.mean()
            pairs += self.encoder_layers * (source**2).sum() + len(self.windows) * cross
        return int(tokens * self.body + targets * self.head + pairs * self.pair)


def lengths(segments: np.ndarray) -> np.ndarray:
    """Of every segment of a batch [B, T]; 0 is padding."""
    rows = np.arange(len(segments))[:, None] * (int(segments.max(initial=0)) + 1)
    found = np.bincount((rows + segments)[segments > 0]).astype(np.float64)
    return found[found > 0]


def speed_of(base: Base, trainable: Mapping[str, Any], dtype: str, length: int | Lengths) -> Speed:
    """For a run on the devices that are here."""
    one, c = flops.flops(base, trainable, length), base.model.config
    chip = chip_of_kind(jax.devices()[0].device_kind)
    return Speed(
        body=(one.layers + one.adapters) / one.tokens,
        head=one.head / (length if isinstance(length, int) else length.target),
        pair=one.attention / sum(s.tokens * look for s in flops.stacks(base, length) for look in s.looks),
        windows=getattr(c, "windows", (None,) * c.layers),
        encoder_layers=getattr(c, "encoder_layers", 0),
        peak=chip.flops(dtype) * jax.device_count() if chip else None,
        chips=jax.device_count(),
    )


def check_memory(c: Any, base: Base, length: Any, say: Callable[[str], None]) -> None:
    """Says what a run will need of its accelerators.

    Args:
      length: of a batch, as the data has it.

    Raises:
      UserError: it does not fit, with the nearest setting that does.
    """
    device = jax.local_devices()[0]
    chip = chip_of_kind(device.device_kind)
    if chip is None:
        return
    # What JAX may take of it (on GPUs XLA_PYTHON_CLIENT_MEM_FRACTION, three quarters unless set).
    limit = (device.memory_stats() or {}).get("bytes_limit") or int(chip.hbm)
    judge(c, base, search.attempt(c, base, chip, jax.device_count(), length), limit, length, say)


def judge(c: Any, base: Base, one: search.Plan | None, limit: int, length: Any, say: Callable[[str], None]) -> None:
    """Refuses a plan that cannot fit `limit` bytes a chip; warns of one that might not.

    Raises:
      UserError: naming the parts, and the nearest setting that fits.
    """
    if one is None:  # what is wrong with it is said where it is read
        return
    needs = certain(one.memory) if one.chip.platform != "tpu" else one.memory.total / SURE
    gib = f"{one.memory.total / GIB:.1f} of {limit / GIB:.1f} GiB a chip"
    if needs <= limit:
        if one.memory.total > limit * (1 - search.MARGIN):
            say(f"WARNING: this run is predicted to need {gib}: it may run out of memory (python -m jaxtune.plan).")
        return
    near = search.nearest(c, base, one.chip, one.chips, length)
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in one.memory.parts().items() if size > GIB / 20)
    raise UserError(
        f"This run does not fit on {one.chips} {one.chip.name}: it needs about {gib} ({parts}).\n"
        f"{remedy(near and near[0])}\n  python -m jaxtune.plan shows more, for any chip."
    )


def certain(has: memory.Memory) -> int:
    """What is there under any compiler: all that is held from step to step, and the layers' inputs."""
    return has.weights + has.trained + has.optimiser + has.batch + has.activations
