"""Hugging Face safetensors in and out, leaf by leaf.

Loading asks every device for its own part of a parameter and reads just that from the files: the host holds at most one
device's part of one (stacked) parameter at a time.  Saving asks for one tensor after the other and writes it down.
"""

import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxtune import hosts, tree
from jaxtune import mesh as meshes
from jaxtune.errors import UserError, did_you_mean
from jaxtune.hf import bnb
from jaxtune.hf.files import open_safetensors, replaced_directory, weight_files
from jaxtune.hf.rows import Row
from jaxtune.models import canonical
from jaxtune.typing import Tree

NUMPY = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
DTYPES = tuple(NUMPY)
PACKED = ("U8", "I8")  # of weights that bitsandbytes has quantised

# Tensors that some checkpoints carry and no model needs: recomputed from the config; T5's embedding once more, by the
# names of both who read it; a bias that T5's first checkpoints have and its attention to the encoder never had.
NEEDLESS = (
    ".rotary_emb.inv_freq",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    ".EncDecAttention.relative_attention_bias.weight",
)


class Stored(NamedTuple):
    """Where a tensor lies.  beside: of a quantised one, how to read what belongs to it (`hf.bnb`), else None."""

    file: Any  # an open safetensors file
    name: str  # its name in that file
    shape: tuple[int, ...]
    beside: dict[str, Callable[[], np.ndarray]] | None = None


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint's text model by the table's name.

    Raises:
      UserError: two tensors with one meaning, or a dtype that is no float.
    """
    found: dict[str, Stored] = {}
    beside: dict[str, dict[str, Callable[[], np.ndarray]]] = {}
    for path in weight_files(directory):
        file = open_safetensors(path)
        for name in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            known = canonical(name)
            if known is None or known.endswith(NEEDLESS):
                continue
            if owner := bnb.owner_of(known):
                beside.setdefault(owner[0], {})[owner[1]] = functools.partial(file.get_tensor, name)
                continue
            view = file.get_slice(name)
            if known in found:
                raise UserError(f"{path.name} has {name!r}, and {found[known].name!r} means the same.")
            if view.get_dtype() not in (*DTYPES, *PACKED):
                raise UserError(
                    f"{path.name}: {name!r} is stored as {view.get_dtype()}. jaxtune reads: {', '.join(DTYPES)}."
                )
            found[known] = Stored(file, name, tuple(view.get_shape()))
    for name, tensor in found.items():
        if tensor.file.get_slice(tensor.name).get_dtype() in PACKED:
            there = beside.get(name, {})
            found[name] = tensor._replace(shape=bnb.shape_of(tensor.name, tensor.shape, there), beside=there)
    return found


def stored_dtype(directory: Path) -> str:
    """The dtype that all of a text model's unquantised tensors have in its files; float32 where they differ."""
    plain = [tensor for tensor in stored_tensors(directory).values() if tensor.beside is None]
    kinds = {tensor.file.get_slice(tensor.name).get_dtype() for tensor in plain}
    return NUMPY[kinds.pop()] if kinds in ({"BF16"}, {"F16"}) else "float32"


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
    mesh: Mesh,
    dtype: Callable[[str], Any],
) -> dict[str, jax.Array]:
    """{path: parameter} of a checkpoint on the mesh.

    Args:
      dtype: of a parameter, by path.
    """
    leaves = {}
    for row in rows:

        def part(index: Any, row: Row = row) -> np.ndarray:
            return read_part(row, stored, index, dtype(row.path))

        where = NamedSharding(mesh, meshes.spec(mesh, row.axes, row.shape))
        # Awaited, so that the host lets go of one before it reads the next.
        leaves[row.path] = jax.block_until_ready(jax.make_array_from_callback(row.shape, where, part))
    return leaves


def save_params(directory: Path, rows: list[Row], params: Tree, source: Path, **how: Any) -> None:
    """Writes parameters as a Hugging Face checkpoint; `how` as for `write_checkpoint`."""
    leaves = tree.flatten(params)

    def value(row: Row, layer: int) -> np.ndarray:
        return hosts.whole(leaves[row.path][layer] if row.stacked else leaves[row.path])

    if not hosts.first():  # it takes part in bringing the values together, in the same order
        for row in rows:
            for layer in range(len(row.names)):
                _turned(value, row, layer, how["dtype"])
        return
    write_checkpoint(directory, rows, value, source, **how)


class Tensor(NamedTuple):
    """A tensor to be written: its value is asked for when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    value: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    directory: Path,
    rows: list[Row],
    value: Callable[[Row, int], np.ndarray],
    source: Path,
    *,
    dtype: Any,
    shard_bytes: int = 4 * 10**9,
    changes: Mapping[str, Any] = MappingProxyType({}),
    readme: str | None = None,
) -> None:
    """Writes a Hugging Face checkpoint: weights in shards, config and tokenizer files copied from `source`, and the
    tensors that are of no text model (a vision tower) as they are there.  The host holds one tensor at a time.

    Args:
      value: of a row and a layer, turned as parameters are.  changes: what config.json says other than `source`'s.

    Raises:
      UserError: a value that is not finite in `dtype`: such a checkpoint is never written.
    """
    names, others = _beside(source)
    tensors = [
        Tensor(names(name), row.tensor_shape, np.dtype(dtype), functools.partial(_turned, value, row, layer, dtype))
        for row in rows
        for layer, name in enumerate(row.names)
    ]
    tensors += others
    shards = split(tensors, shard_bytes)
    with replaced_directory(directory) as new:
        for path in source.iterdir():
            weights = path.name.endswith((".safetensors", ".bin", ".pt", ".gguf", ".index.json"))
            if path.is_file() and not weights and path.name != "README.md":
                shutil.copy(path, new / path.name)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_safetensors(new / name, shard)
            weight_map |= {tensor.name: name for tensor in shard}
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(t.size for t in tensors)}, "weight_map": weight_map}
            (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        config = json.loads((source / "config.json").read_text())
        for part in filter(None, (config, config.get("text_config"))):
            part["dtype" if "dtype" in part else "torch_dtype"] = np.dtype(dtype).name
            part.pop("quantization_config", None)  # no longer, if it ever was
            part.update(changes)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if readme is not None:
            (new / "README.md").write_text(readme)
        check_tensors(rows, stored_tensors(new), new, tied=False)


def _turned(value: Callable[[Row, int], np.ndarray], row: Row, layer: int, dtype: Any) -> np.ndarray:
    found = value(row, layer).astype(dtype)
    if not np.isfinite(found).all():
        raise UserError(f"{row.names[layer]} has values that are not finite as {np.dtype(dtype)}. Nothing is written.")
    return found.T if row.transposed else found


def _beside(source: Path) -> tuple[Callable[[str], str], list[Tensor]]:
    """How the checkpoint that this one is made of names its tensors, and what it has besides the text model."""
    if not any(source.glob("*.safetensors")):
        return lambda name: name, []
    stored = stored_tensors(source)
    prefix = "language_model." if any(s.name.startswith("language_model.") for s in stored.values()) else ""
    others = []
    for path in weight_files(source):
        file = open_safetensors(path)
        for name in file.keys():  # noqa: SIM118
            if canonical(name) is None:
                view = file.get_slice(name)
                kind = np.dtype(NUMPY[view.get_dtype()])
                others.append(Tensor(name, tuple(view.get_shape()), kind, functools.partial(file.get_tensor, name)))
    return lambda name: stored[name].name if name in stored else prefix + name, others


def size_of(text: str | int) -> int:
    """Bytes of '4GB', '500MB' or a number, as transformers' `max_shard_size` has them.

    Raises:
      UserError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(text).strip(), re.IGNORECASE)
    size = 0
    if found:
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))
    if size < 1:
        raise UserError(f"The size of a shard is {text!r}. It is written like 4GB, 500MB or 2GiB.")
    return size


def split(tensors: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Into shards of at most so many bytes, in order; a tensor larger than that has one of its own."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def write_safetensors(path: Path, tensors: list[Tensor]) -> None:
    """Writes the format's header, then one tensor after the other (the library's own writer wants them all at once).

    https://huggingface.co/docs/safetensors: 8 bytes of the header's length, the header as JSON, the bytes in its order.
    """
    words = {np.dtype(numpy): word for word, numpy in NUMPY.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        header[tensor.name] = {"dtype": words[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            value = np.ascontiguousarray(tensor.value())
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise AssertionError(f"{tensor.name}: {value.dtype}{value.shape} where {tensor} was announced")
            file.write(value.view(np.uint8).data)
            del value  # before the next one is made
