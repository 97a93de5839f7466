"""`train.deterministic`: the same command gives the same bits on the same kind of GPU.  (CPUs and TPUs do anyway.)"""

import os

from jaxtune.errors import UserError

FLAG = "--xla_gpu_deterministic_ops"


def ask(wanted: bool) -> None:
    """Has XLA leave out operations whose result depends on the order in which threads come, and choices by measuring
    time.  To be called before jax has devices: XLA reads XLA_FLAGS once.

    Raises:
      UserError: XLA_FLAGS says otherwise already.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    said = next((flag for flag in flags if flag.split("=")[0] == FLAG), None)
    if not wanted or said in (FLAG, f"{FLAG}=true", f"{FLAG}=1"):
        return
    if said is not None:
        raise UserError(f"`train.deterministic` is true, and XLA_FLAGS has {said}. Take one of them back.")
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"{FLAG}=true"])
