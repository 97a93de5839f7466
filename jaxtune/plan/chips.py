"""What is known of each chip, with where it is from.

Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (peak, HBM, links; "bidirectional ICI per chip" is ports * 2 *
`link`), NVIDIA's data sheets (T4, A100, H100 SXM, H200 SXM: dense peaks, not those with sparsity).  `hbm` of TPUs is
what XLA's compiler for them lets a program have (libtpu 0.0.42.1; of v4 twice what it lets one of its two cores), of
GPUs what the driver reports less 0.6 GiB for its context.
"""

import dataclasses
import math

from jaxtune.errors import UserError, did_you_mean

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    hbm: bytes that a program can have.  peak: FLOP/s of products by dtype of their operands.  bandwidth: bytes/s of its
    memory.  link: bytes/s one way of one link to a neighbour (GPUs: of all of NVLink, or of PCIe).  host: bytes/s to
    the host's memory.  slices: {chips: topology} that can be had, None for any number up to `per_host`.  per_host:
    chips of one host.  kinds: beginnings of `device_kind`.
    """

    name: str
    platform: str
    hbm: float
    peak: dict[str, float]
    bandwidth: float
    link: float
    host: float
    per_host: int
    kinds: tuple[str, ...]
    slices: dict[int, str] | None = None

    def ports(self, chips: int) -> int:
        """Links over which a chip of a slice receives at a time: one for each axis of its topology, two where the axis
        is longer than two (a chip in the middle has two neighbours)."""
        if self.slices is None:
            return 1
        sizes = [int(size) for size in self.slices[chips].split("x")]
        return max(sum(min(size - 1, 2) for size in sizes), 1)

    def flops(self, dtype: str) -> float:
        return self.peak[dtype]

    def counts(self) -> list[int]:
        """The numbers of chips that can be had, ascending."""
        return sorted(self.slices) if self.slices else [n for n in (1, 2, 4, 8) if n <= self.per_host]


def flat(*shapes: str) -> dict[int, str]:
    return {math.prod(int(size) for size in shape.split("x")): shape for shape in shapes}


def tpu_peak(value: float) -> dict[str, float]:
    """Operands in float32 are multiplied as bfloat16 (XLA's default precision); float16 there is turned into it."""
    return {"bfloat16": value, "float16": value, "float32": value}


V5E_SLICES = flat("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = flat("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 30.5 * GIB, tpu_peak(275e12), 1228e9, 50e9, 16e9, 4, ("TPU v4",), CUBES),
        Chip("v5e", "tpu", 15.75 * GIB, tpu_peak(197e12), 819e9, 50e9, 16e9, 8, ("TPU v5 lite", "TPU v5e"), V5E_SLICES),
        Chip("v5p", "tpu", 95.74 * GIB, tpu_peak(459e12), 2765e9, 100e9, 16e9, 4, ("TPU v5",), CUBES),
        Chip(
            "v6e", "tpu", 31.25 * GIB, tpu_peak(918e12), 1638e9, 100e9, 32e9, 8, ("TPU v6 lite", "TPU v6e"), V5E_SLICES
        ),
        # Turing multiplies no bfloat16 in its tensor cores.
        Chip(
            *("t4", "gpu", 14.1 * GIB, {"bfloat16": 8.1e12, "float16": 65e12, "float32": 8.1e12}),
            *(320e9, 12e9, 12e9, 4, ("Tesla T4",)),
        ),
        # float32 products go by TF32 (XLA's default precision).
        Chip(
            *("a100", "gpu", 78.6 * GIB, {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12}),
            *(2039e9, 300e9, 25e9, 8, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB")),
        ),
        Chip(
            *("a100-40", "gpu", 38.8 * GIB, {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12}),
            *(1555e9, 300e9, 25e9, 8, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
        ),
        Chip(
            *("h100", "gpu", 79.0 * GIB, {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}),
            *(3350e9, 450e9, 50e9, 8, ("NVIDIA H100",)),
        ),
        Chip(
            *("h200", "gpu", 139.2 * GIB, {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}),
            *(4800e9, 450e9, 50e9, 8, ("NVIDIA H200",)),
        ),
    )
}


def chip_named(name: str) -> Chip:
    """A chip of the table.

    Raises:
      UserError: none of that name.
    """
    key = name.lower().removeprefix("tpu-").removeprefix("tpu ")
    key = {"v5litepod": "v5e", "trillium": "v6e", "a100-80": "a100"}.get(key, key)
    if key not in CHIPS:
        raise UserError(f"--chip is {name!r}. jaxtune knows: {', '.join(CHIPS)}.{did_you_mean(key, CHIPS)}")
    return CHIPS[key]


def chip_of_kind(kind: str) -> Chip | None:
    """The chip of a `device_kind`; None where it is not known (as a CPU's).  The longest beginning that fits counts:
    "TPU v5" is a v5p and "TPU v5 lite" is not."""
    fits = [(len(start), chip) for chip in CHIPS.values() for start in chip.kinds if kind.startswith(start)]
    return max(fits, key=lambda pair: pair[0])[1] if fits else None


def check_count(chip: Chip, chips: int) -> None:
    """Refuses a number of chips that cannot be had.

    Raises:
      UserError: naming those that can.
    """
    if chips not in (chip.slices or range(1, chip.per_host * 64 + 1)):
        counts = chip.counts()
        near = min(counts, key=lambda n: abs(n - chips))
        raise UserError(
            f"--chips is {chips}. {chip.name} is to be had in slices of: {', '.join(map(str, counts))} chips (nearest: "
            f"{near}). Names such as v5p-16 count cores, two a chip: that is --chips 8."
        )
