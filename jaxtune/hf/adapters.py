"""PEFT adapter directories in and out: `adapter_config.json` + `adapter_model.safetensors`.

peft's own loader warns about a missing tensor and ignores an unexpected one, and the model then runs as if nothing had
been trained.  Here every tensor must be accounted for, in both directions.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from jaxtune import mesh as meshes
from jaxtune.errors import ExportError, MissingInputError, UserError, did_you_mean
from jaxtune.hf.files import open_safetensors, read_json, replaced_directory
from jaxtune.hf.handover import read_ours, write_ours
from jaxtune.models import canonical
from jaxtune.peft import BY_PEFT_TYPE, prompt, saved
from jaxtune.peft.keys import read_config
from jaxtune.peft.method import Layout, from_variables, to_variables, without_idle_targets
from jaxtune.typing import Tree

PREFIX = "base_model.model."
CONFIG_LIMIT = 2**20
# What does the same as a type that is not here.
INSTEAD = {"TRAINABLE_TOKENS": " LoRA trains such rows too: `trainable_token_indices`, in either library."}


class PeftAdapter(NamedTuple):
    """What a PEFT directory holds: the method, its config and {path: adapter}, boxed with logical axes."""

    method: Any  # a module of jaxtune.peft
    config: Any
    adapters: dict[str, Any]
    base: str | None  # base_model_name_or_path, as written; never followed
    trained_over: dict[str, Any] | None = None  # see hf.handover; None where the file does not say


def read_tensors(directory: Path, own_names: Collection[str] = (), prefix: str = PREFIX) -> dict[str, np.ndarray]:
    """The tensors of an adapter by the table's module names.

    Args:
      own_names: those that belong to no module, as `prompt_embeddings`.  prefix: what the others' begin with.

    Raises:
      MissingInputError: no safetensors there.  UserError: damaged, not floats, or not finite.
    """
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        there = sorted(p.name for p in directory.iterdir())[:20] if directory.is_dir() else []
        pickle = " adapter_model.bin is a pickle, which runs code when read: save it again with a current peft."
        raise MissingInputError(
            f"{directory} has no adapter_model.safetensors. It holds: {', '.join(there) or 'nothing'}."
            + (pickle if "adapter_model.bin" in there else "")
        )
    file, tensors = open_safetensors(path), {}
    for name in file.keys():  # noqa: SIM118
        if name not in own_names and not name.startswith(prefix):
            raise UserError(f"{path}: tensor {name!r} does not start with {prefix!r}, as PEFT's do.")
        # Files written by old peft versions keep the adapter's name in the middle.
        known = canonical(name.removeprefix(prefix).replace(".default.", "."))
        value = file.get_tensor(name)
        if known is None or known in tensors:
            raise UserError(f"{path}: {name!r} is of another tower, or means the same as another tensor.")
        if value.dtype.kind not in "fV" and value.dtype.name != "bfloat16":
            raise UserError(f"{path}: {name!r} is stored as {value.dtype}; an adapter holds floats.")
        value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {name!r} holds values that are not finite. The adapter is damaged or diverged.")
        tensors[known] = value
    return tensors


def load_adapter(directory: Path, layout: Layout, **ours: Any) -> PeftAdapter:
    """Reads a PEFT directory for a model of this layout.

    Args:
      ours: a method's OUR_KEYS, over those of jaxtune.json; None: not given.

    Raises:
      MissingInputError, UserError: naming the key, the tensor or the shape that does not fit.
    """
    if not (directory / "adapter_config.json").is_file():
        inside = [path for path in (directory / "adapter", *directory.glob("adapter-*")) if path.is_dir()]
        there = sorted(p.name for p in directory.iterdir())[:20] if directory.is_dir() else None
        raise MissingInputError(
            f"{directory} is no PEFT directory: "
            + ("there is no such directory" if there is None else f"it holds {', '.join(there) or 'nothing'}")
            + (f". Did you mean {inside[0]}?" if inside else ". An adapter on the Hub is fetched with `hf download`.")
        )
    method, config, values = read_method(directory / "adapter_config.json", layout, **ours)
    tensors = read_tensors(directory, own_names(method), getattr(method, "PREFIX", PREFIX))
    stored, known = len(tensors), list(tensors)
    try:
        adapters = method.from_peft(layout, config, tensors)
        for site in saved.choose(layout.sites, config.modules_to_save):
            adapters[site.path] = saved.from_peft(site, tensors)
    except KeyError as error:
        raise UserError(
            f"{directory} has no tensor {error.args[0]!r}, which its config asks for on this model."
            f"{did_you_mean(error.args[0], known)} It has {stored} tensors; is it for another base model?"
        ) from None
    if tensors:  # each was taken out as it was used
        listed = "\n".join(f"  {name}" for name in sorted(tensors)[:5])
        raise UserError(f"{directory} has {len(tensors)} tensors that its config and this model do not use:\n{listed}")
    return PeftAdapter(
        method, config, adapters, values.get("base_model_name_or_path"), read_ours(directory).get("base")
    )


def read_method(path: Path, layout: Layout, **ours: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The method of an adapter_config.json, its config for a model of this layout, and all that the file says.

    Raises:
      UserError: a type that jaxtune does not have, or a key that it does not honour.
    """
    values = read_json(path, CONFIG_LIMIT)
    peft_type = values.get("peft_type")
    if peft_type not in BY_PEFT_TYPE:
        raise UserError(
            f"{path} says peft_type={peft_type!r}. jaxtune has: {', '.join(BY_PEFT_TYPE)}."
            + INSTEAD.get(str(peft_type), did_you_mean(str(peft_type), BY_PEFT_TYPE))
        )
    method = BY_PEFT_TYPE[peft_type]
    values |= our_values(path.parent, method, {key: value for key, value in ours.items() if value is not None})
    begun = {key: now for (key, said), now in getattr(method, "BEGUN", {}).items() if values.get(key) == said}
    config = read_config(method.Config, values | begun, method.NEUTRAL, str(path))
    return method, without_idle_targets(layout, config), values


def own_names(method: Any) -> Collection[str]:
    """Tensors of a method that belong to no module."""
    return getattr(method, "OWN_NAMES", ())


def our_values(directory: Path, method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the method's OUR_KEYS: those `given`, else those of jaxtune.json, where we wrote one.

    Raises:
      UserError: a key is given that the method does not have.
    """
    keys = getattr(method, "OUR_KEYS", ())
    for key in given:
        if key not in keys:
            raise UserError(f"{key} is given, and {directory} is of type {method.PEFT_TYPE}, which knows no such key.")
    return {key: value for key, value in read_ours(directory).items() if key in keys} | dict(given)


def place_adapters(mesh: Mesh, boxed: Mapping[str, Any]) -> dict[str, Tree]:
    """Boxed adapters by path to the model's collections on the mesh, each sharded as its weight is."""
    variables = to_variables(boxed)
    return jax.device_put(nn.unbox(variables), meshes.shardings(mesh, variables))


def adapter_tensors(adapters: Mapping[str, Any], layout: Layout) -> dict[str, np.ndarray]:
    """PEFT's tensors of a set of adapters ({path: adapter}, unboxed), by PEFT's names."""
    sites = {site.path: site for site in layout.sites}
    # PEFT wraps a model around the base, except with prompts and prefixes.
    before = PREFIX if all(path in sites for path in adapters) else prompt.PREFIX
    tensors: dict[str, np.ndarray] = {}
    for path, adapter in adapters.items():
        if path not in sites:
            tensors |= adapter.to_peft()
            continue
        for layer, module in enumerate(sites[path].modules):
            for suffix, value in adapter.to_peft(sites[path], layer).items():
                tensors[f"{before}{layout.peft_module(module)}.{suffix}"] = value
    for kind in dict.fromkeys(type(a) for a in adapters.values() if hasattr(a, "own_tensors")):
        tensors |= kind.own_tensors(layout, {path: a for path, a in adapters.items() if isinstance(a, kind)})
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in tensors.items()}


def save_adapter(
    directory: Path,
    variables: Tree,
    layout: Layout,
    peft: PeftAdapter,
    base: str,
    *,
    readme: str = "",
    check: Callable[[PeftAdapter], None] = lambda again: None,
) -> None:
    """Writes a PEFT directory in one piece: beside it first, read back, then renamed.

    Args:
      variables: the model's, on the mesh; its adapters may have been trained since `peft` was read.
      base: `base_model_name_or_path`.
      check: is given what was read back, and raises if it is not what was meant.

    Raises:
      UserError: a value that is not finite: such an adapter is never written.
      ExportError: other tensors come back than were written.
    """
    flat = from_variables(variables)
    tensors = adapter_tensors(flat, layout)
    bad = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if bad or not tensors:
        raise UserError(f"The adapter is not written: {bad[0] + ' is not finite' if bad else 'it has no tensors'}.")
    peft_type = peft.method.PEFT_TYPE
    values = {
        **peft.method.to_config(layout, peft.config, flat),
        "peft_type": peft_type,
        "task_type": "SEQ_2_SEQ_LM" if layout.encoder_layers else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "auto_mapping": None,
        "revision": None,
    }
    ours = {key: values.pop(key) for key in getattr(peft.method, "OUR_KEYS", ())}
    if "target_modules" in values:
        values["target_modules"] = exported_targets(values["target_modules"], layout, flat)
    with replaced_directory(directory) as new:
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        (new / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True, default=list) + "\n")
        (new / "README.md").write_text(readme)
        write_ours(new, ours | ({"base": peft.trained_over} if peft.trained_over else {}))
        again = load_adapter(new, layout)
        check_same(tensors, adapter_tensors(nn.unbox(again.adapters), layout))
        check(again)


def check_same(written: Mapping[str, np.ndarray], read: Mapping[str, np.ndarray]) -> None:
    """Refuses an adapter of which other tensors come back than were written.

    Raises:
      ExportError: naming the first of them.
    """
    names = sorted(written.keys() | read.keys())
    other = [n for n in names if n not in written or n not in read or not np.array_equal(written[n], read[n])]
    if other:
        raise ExportError(
            f"The adapter that was written is not the one that is read back: {len(other)} of {len(names)} tensors "
            f"differ, {other[0]} first. It was removed."
        )


def exported_targets(asked: Any, layout: Layout, adapters: Mapping[str, Any]) -> Any:
    """`target_modules` as other loaders understand it: names instead of "all-linear" or a family's default.

    In a multimodal checkpoint the same names stand in the vision tower, so that whole paths are needed.
    """
    modules = sorted(
        layout.peft_module(module)
        for site in layout.sites
        if site.path in adapters and getattr(adapters[site.path], "targeted", True)
        for layer, module in enumerate(site.modules)
        if adapters[site.path].to_peft(site, layer)
    )
    if layout.text_prefix:
        return modules
    if asked is None or (isinstance(asked, str) and asked.lower() == "all-linear"):
        return sorted({name.rsplit(".", 1)[-1] for name in modules})
    return asked
