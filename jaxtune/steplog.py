"""What a step took.  (Its numbers are `jaxtune.metrics.StepLog`'s.)"""

import resource
import sys

import jax

from jaxtune.metrics import StepLog

__all__ = ["StepLog", "peak_memory"]


def peak_memory() -> int:
    """The most bytes that one device of this process held; on CPUs, which do not count them, the process."""
    counts = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if any(counts):
        return max(counts)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
