"""The config as this backend reads it: what it cannot honour is refused by name, before anything is read."""

import os
from collections.abc import Callable
from typing import Any

import torch

from jaxtune.config import get_default
from jaxtune.errors import CannotCreateError, UserError
from torch_gpu import method, optim
from torch_gpu.model import Processes


def check(plain: dict[str, Any]) -> None:
    """Refuses keys that mean something on a TPU mesh alone, or that transformers, peft and bitsandbytes do not have.

    Raises:
      UserError: naming the key.
    """
    usual: Any = get_default()
    for key, value in plain["mesh"].items():
        if value != usual.mesh[key]:
            raise UserError(
                f"`mesh.{key}` is {value}. On GPUs torchrun says how many processes there are, each with a whole copy "
                "of the model: leave `mesh` out, and run torchrun --nproc_per_node=N -m torch_gpu.train …"
            )
    if plain["data"]["packing"]:
        raise UserError(
            "`data.packing` is true: transformers keeps the rows of a pack apart in few of its attentions, and would "
            "let them see each other in the rest. Set it to false, or take jaxtune.train. Batches here are no wider "
            "than their longest row."
        )
    if plain["model"]["quant_embedding"]:
        raise UserError(
            "`model.quant_embedding` is true: transformers has no quantised embeddings. Set it to false, or take "
            "jaxtune.train."
        )
    if plain["train"]["z_loss"]:
        raise UserError(
            f"`train.z_loss` is {plain['train']['z_loss']:g}: transformers' losses have no such term. Set it to 0, or "
            "take jaxtune.train."
        )
    if plain["model"]["double_quant"] and plain["model"]["quant"] != "nf4":
        raise UserError("`model.double_quant` is true, and `model.quant` is not nf4. Set `model.quant` to nf4.")
    method.given(plain["peft"])
    if plain["export"]["format"] == "checkpoint":
        raise UserError("`export.format` is checkpoint. torch_gpu trains adapters; unset it.")
    optim.check(plain["optim"])


def deterministic(wanted: bool) -> None:
    """Has torch take operations that give the same bits each time; an operation that has no such form raises there.

    To be called before anything is on a card: cuBLAS reads its setting once.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def check_batch(size: int, processes: int, name: str) -> None:
    """Refuses rows that the processes cannot share.

    Raises:
      UserError: naming the key.
    """
    if size % processes:
        raise UserError(
            f"{name} is {size}, and torchrun started {processes} processes. It must be a multiple, e.g. "
            f"{-(-size // processes) * processes}."
        )


def remat(c: Any, say: Callable[[str], None]) -> bool:
    """Whether layers are computed again in the backward pass.  transformers drops a prefix where they are, and knows
    none of the policies between all and nothing."""
    wanted = c.train.remat != "none"
    if wanted and c.train.remat != "full":
        say(f"`train.remat` is full here: transformers has no {c.train.remat!r}")
    if wanted and c.peft.method == "prefix_tuning":
        say("`train.remat` is none here: transformers' checkpointing drops the keys and values of a prefix")
        return False
    return wanted


def together(look: Callable[[], Any], processes: Processes) -> Any:
    """What the first process finds, in all of them; an error there ends them all.

    Raises:
      UserError: in the first, what `look` raised; in the others, that it did.
    """
    if processes.count == 1:
        return look()
    found: list[Any] = [None, None]
    error: UserError | None = None
    if processes.index == 0:
        try:
            found[0] = look()
        except UserError as raised:
            error, found[1] = raised, str(raised)
    torch.distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise error or CannotCreateError(found[1])
    return found[0]
