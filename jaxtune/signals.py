"""A polite stop: the first signal asks the run to end after its step, the second ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def stop_requests(several: bool = False) -> Iterator[list[int]]:
    """A list that SIGTERM, SIGINT (Ctrl-C) or SIGHUP (a dropped ssh) puts its number in.

    JAX saves on SIGTERM only under `jax.distributed`; on one host (Kaggle, Colab, v5e-8) a plain run would just die.
    Of several processes it takes care of SIGTERM itself, and the others become one: see `hosts.stopping`.
    Signals that this process was started to ignore (`nohup`, a shell script's `&`) stay ignored.
    """
    caught: list[int] = []

    def handler(number: int, _: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    asking = (signal.SIGINT, signal.SIGHUP) if several else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    numbers = [s for s in asking if signal.getsignal(s) is not signal.SIG_IGN]
    # Python hands signals to the main thread, and only it may ask for them.
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)
