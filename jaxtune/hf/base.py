"""A model on disk: opened (shapes, names, config) without reading a weight, then loaded onto a mesh."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import mesh as meshes
from jaxtune.errors import MissingInputError
from jaxtune.hf.files import fingerprint, model_directory, read_json
from jaxtune.hf.rows import Row, rows_of, sites_of
from jaxtune.hf.weights import check_tensors, load_params, stored_tensors
from jaxtune.layers import abstract_params
from jaxtune.models import build
from jaxtune.peft.method import Layout, Site
from jaxtune.typing import Tree


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model.  `abstract` are its parameters' shapes in boxes with logical axes."""

    id: str
    directory: Path
    hf_config: dict[str, Any]
    model: Any  # the Flax module
    abstract: Tree
    rows: list[Row]
    sites: list[Site]

    @property
    def text_prefix(self) -> str:
        """What PEFT's module paths have between `model.` and `layers` when transformers loads this checkpoint."""
        return "language_model." if "text_config" in self.hf_config else ""

    @property
    def layout(self) -> Layout:
        """What adapters may know of it."""
        c = self.model.config
        sizes = {"vocab": c.vocab_size, "width": c.width, "layers": c.layers}
        heads = {"heads": c.heads, "kv_heads": c.kv_heads, "head_dim": c.head_dim}
        prefix = self.text_prefix
        return Layout(c.family, tuple(self.sites), c.tied, c.width**0.5, **sizes, **heads, text_prefix=prefix)

    def fingerprint(self) -> str:
        return fingerprint(self.directory)


def open_base(model_id: str, *, revision: str | None = None, dtype: str = "float32", remat: bool = False) -> Base:
    """Reads config.json and lays out the parameters; no weight is read and no memory taken."""
    directory = model_directory(model_id, revision)
    if not (directory / "config.json").is_file():
        inside = sorted(path.name for path in directory.iterdir())
        raise MissingInputError(
            f"`model.id` is {model_id!r}, and {directory} has no config.json: it is no model. It holds: "
            f"{', '.join(inside[:20]) or 'nothing'}."
        )
    return describe(model_id, directory, read_json(directory / "config.json"), dtype=dtype, remat=remat)


def describe(model_id: str, directory: Path, hf_config: dict[str, Any], *, dtype: str, remat: bool = False) -> Base:
    """The layout of a parsed config.json, wherever its weights are."""
    model = build(hf_config, dtype=jnp.dtype(dtype), remat=remat)
    ids = jnp.zeros((1, 2), jnp.int32)
    abstract = abstract_params(model, ids, ids, ids)
    rows = rows_of(hf_config, abstract)
    return Base(model_id, directory, hf_config, model, abstract, rows, sites_of(rows, tied=model.config.tied))


def load_base(base: Base, mesh: Mesh, dtype: Callable[[str], Any]) -> Tree:
    """The base's parameters on the mesh; `dtype` gives each one's by path.

    Raises:
      UserError: the checkpoint's tensors do not fit its config.
    """
    stored = stored_tensors(base.directory)
    check_tensors(base.rows, stored, base.directory, tied=base.model.config.tied)
    return load_params(base.rows, stored, meshes.shardings(mesh, base.abstract), dtype)
