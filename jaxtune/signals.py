"""A polite stop: the first signal asks the run to end after its step, the second ends it at once."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that SIGTERM, SIGINT (Ctrl-C) or SIGHUP (a dropped ssh) puts its number in.

    JAX saves on SIGTERM only under `jax.distributed`; on one host (Kaggle, Colab, v5e-8) a plain run would just die.
    """
    caught: list[int] = []

    def handler(number: int, _: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)
