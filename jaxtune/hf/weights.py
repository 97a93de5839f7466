"""Hugging Face safetensors in and out, leaf by leaf.

Loading asks every device for its own part of a parameter and reads just that from the files: the host holds at most one
device's part of one (stacked) parameter at a time.  Saving gathers one tensor after the other into shards.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxtune import tree
from jaxtune.errors import UserError, did_you_mean
from jaxtune.hf.files import open_safetensors, replaced_directory, weight_files
from jaxtune.hf.rows import Row
from jaxtune.models import gemma_hf
from jaxtune.typing import Tree

DTYPES = ("F32", "F16", "BF16", "F64")

# Tensors that some checkpoints carry and no model needs: recomputed from the config.
BUFFERS = (".rotary_emb.inv_freq",)


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Any  # an open safetensors file
    name: str  # its name in that file
    shape: tuple[int, ...]


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint's text model by the table's name.

    Raises:
      UserError: two tensors with one meaning, or a dtype that is no float.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(directory):
        file = open_safetensors(path)
        for name in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            canonical = gemma_hf.canonical(name)
            if canonical is None or canonical.endswith(BUFFERS):
                continue
            view = file.get_slice(name)
            if canonical in found:
                raise UserError(f"{path.name} has {name!r}, and {found[canonical].name!r} means the same.")
            if view.get_dtype() not in DTYPES:
                raise UserError(
                    f"{path.name}: {name!r} is stored as {view.get_dtype()}. jaxtune reads: {', '.join(DTYPES)}."
                )
            found[canonical] = Stored(file, name, tuple(view.get_shape()))
    return found


def check_tensors(rows: list[Row], stored: Mapping[str, Stored], directory: Path, *, tied: bool) -> None:
    """Refuses a checkpoint whose tensors do not fit its config, listing the first differences of each kind.

    Raises:
      UserError: missing, unexpected or misshapen tensors.
    """
    needed = {name: row.tensor_shape for row in rows for name in row.names}
    extra = set(stored) - set(needed) - ({"lm_head.weight"} if tied else set())
    missing = [n for n in needed if n not in stored]
    wrong = [n for n in needed if n in stored and stored[n].shape != needed[n]]
    lines = [f"  missing: {n}{did_you_mean(n, extra)}" for n in missing[:5]]
    lines += [f"  unexpected: {n}" for n in sorted(extra)[:5]]
    lines += [f"  {n} has shape {list(stored[n].shape)}; config.json needs {list(needed[n])}" for n in wrong[:5]]
    if lines:
        raise UserError(
            f"The tensors in {directory} do not fit its config.json "
            f"({len(missing)} missing, {len(extra)} unexpected, {len(wrong)} of another shape):\n" + "\n".join(lines)
        )


def read_part(row: Row, stored: Mapping[str, Stored], index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """The part `index` of a parameter, turned and cast, reading nothing else from the files."""
    whole = [slice(*s.indices(size)) for s, size in zip(index, row.shape, strict=True)]
    layers = range(row.shape[0])[whole[0]] if row.stacked else [0]
    inner = whole[1:] if row.stacked else whole
    out = np.empty((len(layers), *(s.stop - s.start for s in inner)), dtype)
    for slot, layer in enumerate(layers):
        tensor = stored[row.names[layer]]
        view = tensor.file.get_slice(tensor.name)
        out[slot] = view[tuple(inner[::-1])].T if row.transposed else view[tuple(inner)]
    return out if row.stacked else out[0]


def load_params(
    rows: list[Row],
    stored: Mapping[str, Stored],
    shardings: Tree,
    dtype: Callable[[str], Any],
) -> Tree:
    """The parameters of a checkpoint as sharded arrays.

    Args:
      shardings: one per parameter.  dtype: of a parameter, by path.
    """
    where = tree.flatten(shardings)
    leaves = {}
    for row in rows:

        def part(index: Any, row: Row = row) -> np.ndarray:
            return read_part(row, stored, index, dtype(row.path))

        leaves[row.path] = jax.make_array_from_callback(row.shape, where[row.path], part)
    return tree.nest(leaves)


def save_params(
    directory: Path, rows: list[Row], params: Tree, source: Path, *, dtype: Any, shard_bytes: int = 4 * 2**30
) -> None:
    """Writes a Hugging Face checkpoint: weights in shards, config and tokenizer files copied from `source`."""
    with replaced_directory(directory) as new:
        for path in source.iterdir():
            weights = path.name.endswith((".safetensors", ".bin", ".pt", ".gguf", ".index.json"))
            if path.is_file() and not weights and path.name != "README.md":
                shutil.copy(path, new / path.name)

        leaves = tree.flatten(params)
        sizes = [(row, layer) for row in rows for layer in range(len(row.names))]
        shards: list[list[tuple[Row, int]]] = [[]]
        filled = 0
        for row, layer in sizes:
            size = int(np.prod(row.tensor_shape)) * np.dtype(dtype).itemsize
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((row, layer))
            filled += size
        weight_map: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for row, layer in shard:
                leaf = leaves[row.path]
                value = np.asarray(leaf[layer] if row.stacked else leaf).astype(dtype)
                tensors[row.names[layer]] = np.ascontiguousarray(value.T if row.transposed else value)
                weight_map[row.names[layer]] = name
                total += value.nbytes
            save_file(tensors, new / name, metadata={"format": "pt"})
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        config = json.loads((source / "config.json").read_text())
        config[("dtype" if "dtype" in config else "torch_dtype")] = np.dtype(dtype).name
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
