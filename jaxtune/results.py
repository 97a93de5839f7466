"""What a run leaves: an adapter, a merged checkpoint or a model; whether it can be, how it is written, how loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import hosts, tree
from jaxtune.adapt import Adapted
from jaxtune.errors import UserError
from jaxtune.hf import handover, hub
from jaxtune.hf.adapters import PeftAdapter
from jaxtune.hf.base import Base
from jaxtune.hf.card import Run, card
from jaxtune.hf.merge import save_merged
from jaxtune.hf.weights import save_params
from jaxtune.peft import METHODS, lora, partial
from jaxtune.peft.method import NO_TARGETS, to_variables
from jaxtune.probe import logits_of, write_adapter


def export_kind(config: Any, merged: bool = False) -> str:
    """adapter | merged | model: the form of what a run leaves, and its directory's name."""
    if config["peft"]["method"] in METHODS:
        return "merged" if merged else "adapter"
    return "adapter" if config["export"]["format"] == "adapter" and not merged else "model"


def check_quantised(config: Any, base: Base, merged: bool = False) -> None:
    """Refuses what a quantised base cannot give.

    Raises:
      UserError: its weights are to be trained, or to be written as a checkpoint.
    """
    if base.quant is None or export_kind(config, merged) != "model":
        return
    if config["peft"]["method"] == "full":
        raise UserError(
            f"`peft.method` is full and the base is quantised ({base.quant}): such weights cannot train. Set "
            "`model.quant` to None, or take an adapter (lora)."
        )
    raise UserError(
        f"The base is quantised ({base.quant}), and the run is to end in a whole checkpoint. Set `export.format` to "
        "adapter, which holds what was trained alone."
    )


def check_push(config: Any, merged: bool = False) -> None:
    """Refuses, before anything is done for it, what could not be pushed in the end.

    Raises:
      UserError: as `hub.check`.
    """
    section = config["export"]
    if section["push_to_hub"]:
        name = section["base_model_name_or_path"] or config["model"]["id"]
        hub.check(section["push_to_hub"], name if export_kind(config, merged) == "adapter" else None)


def export(
    workdir: Path,
    base: Base,
    mesh: Mesh,
    adapted: Adapted,
    trainable: dict[str, jax.Array],
    run: Run,
    say: Callable[[str], None],
    *,
    out: Path | None = None,
    dtype: Any = None,
    shard_bytes: int = 4 * 10**9,
    merged: bool = False,
    onto: str | None = None,
) -> Path:
    """Writes what was trained: an adapter (a PEFT directory), or a Hugging Face checkpoint, as `export.format` says.

    Args:
      out: None: `adapter`, `model` or `merged` in the run directory.  dtype: of a checkpoint; None: the model's.
      merged: a checkpoint with the adapter folded in.  onto: of a quantised base, as `save_merged`.

    Raises:
      UserError, ExportError: as `write_adapter` and `save_merged`.
    """
    config: Any = run.config
    variables, peft, section = adapted.variables(trainable), adapted.peft, config["export"]
    kind = export_kind(config, merged)
    where = out or workdir / kind
    name, method = section["base_model_name_or_path"] or config["model"]["id"], config["peft"]["method"]
    about = {"over": base.settings, "onto": onto, "seq2seq": base.encodes}
    readme = card(kind, name, method, run, section["push_to_hub"], **about)
    dtype = dtype or base.model.dtype
    if kind == "model":
        how = {"dtype": dtype, "shard_bytes": shard_bytes, "readme": readme, "changes": base.as_written}
        save_params(where, base.rows, variables["params"], base.directory, **how)
        return where
    if kind == "merged":
        how = {"dtype": dtype, "shard_bytes": shard_bytes, "readme": readme, "peft_type": method, "onto": onto}
        found = save_merged(where, base, variables, logits=logits_of(base, mesh, variables, peft), **how)
        say(merge_report(dtype, found, base.quant and base.quant.kind, onto))
        return where
    if peft is None:
        whole = partial.as_adapters(base.layout, adapted.layers, tree.flatten(variables["params"]))
        names = partial.saved_names(base.layout, whole)
        peft = PeftAdapter(lora, lora.Config(target_modules=NO_TARGETS, modules_to_save=names), {}, None)
        variables |= to_variables(whole)
    peft = peft._replace(trained_over=base.as_trained_over())
    variables |= {name: hosts.replicated(mesh, part) for name, part in variables.items() if name != "params"}
    changes = adapted.peft is not None  # otherwise the base is no longer what it was
    write_adapter(where, base, mesh, variables, peft, name, readme=readme, say=say, changes=changes)
    return where


def merge_report(dtype: Any, found: float, quant: str | None, onto: str | None) -> str:
    """What a merge came to, in words.  quant: of the base that the adapter was trained over."""
    if onto == "original" and quant:
        return (
            f"merged in {jnp.dtype(dtype)} into the original weights; the adapter was trained over their {quant} "
            "rounding, so that the model differs from the trained one by what that had lost"
        )
    return f"merged in {jnp.dtype(dtype)}: logits are the adapter's but for {found:.0e} of the largest"


def how_to_load(where: Path, base: Base) -> str:
    """What to type to use the result in transformers and peft."""
    if not (where / "adapter_config.json").exists():
        return (
            f"The model is in {where}. To load it:\n"
            f"  model = transformers.{handover.auto_class(base.encodes)}.from_pretrained({str(where)!r}, dtype='auto')"
        )
    dtype = str(jnp.dtype(base.model.dtype))
    return handover.how_to_load(where, base.directory, dtype, base.settings, seq2seq=base.encodes)
