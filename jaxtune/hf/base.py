"""A model on disk: opened (shapes, names, config) without reading a weight, then loaded onto a mesh."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtune import tree
from jaxtune.errors import MissingInputError, UserError
from jaxtune.hf import bnb
from jaxtune.hf.boxes import axis_of, load_box, lost_of
from jaxtune.hf.files import NEEDED, fingerprint, model_directory, read_json
from jaxtune.hf.handover import trained_over
from jaxtune.hf.rows import Row, rows_of, sites_of
from jaxtune.hf.weights import check_tensors, load_params, stored_tensors
from jaxtune.layers import abstract_params
from jaxtune.models import build, is_encoder_decoder, table_of
from jaxtune.peft.method import Layout, Site
from jaxtune.quant import Scheme, check_blocks
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
    quant: Scheme | None = None

    def quantises(self, path: str) -> bool:
        """Whether the parameter at this path is quantised when it is loaded."""
        return self.quant is not None and self.quant.takes(path)

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
        more = {"text_prefix": self.text_prefix, "quant": self.quant.kind if self.quant else None}
        if self.encodes:
            more["encoder_layers"] = c.encoder_layers
        return Layout(c.family, tuple(self.sites), c.tied, c.embed_scale, **sizes, **heads, **more)

    @property
    def as_written(self) -> dict[str, Any]:
        """What config.json has to say of an encoder-decoder, so that transformers 4 and 5 read it alike."""
        keys = ("tie_word_embeddings", "scale_decoder_outputs") if self.encodes else ()
        return {key: self.hf_config[key] for key in keys}

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder and a decoder."""
        return is_encoder_decoder(self.hf_config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of its files (`hf.files.fingerprint`), which are read once."""
        return fingerprint(self.directory)

    def as_trained_over(self) -> dict[str, Any]:
        """What is written beside an adapter that was trained over it."""
        return trained_over(self.fingerprint, **self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """How it is quantised, by the config's keys."""
        q = self.quant
        return {
            "quant": q and q.kind,
            "double_quant": bool(q and q.double),
            "quant_embedding": bool(q and q.embedding),
        }


def open_base(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    remat: str = "none",
    unroll: int = 1,
    quant: Scheme | None = None,
    weights: bool = True,
) -> Base:
    """Reads config.json and lays out the parameters; no weight is read and no memory taken.

    Args:
      quant: how the weights are to be quantised; None: as they are stored.
      weights: whether they are to be read later; False asks the Hub for config.json alone.

    Raises:
      MissingInputError, UserError: no model, one that we would compute wrongly, or one that cannot be quantised so.
    """
    directory = model_directory(model_id, revision, NEEDED if weights else ["config.json"])
    if not (directory / "config.json").is_file():
        inside = sorted(path.name for path in directory.iterdir())
        raise MissingInputError(
            f"`model.id` is {model_id!r}, and {directory} has no config.json: it is no model. It holds: "
            f"{', '.join(inside[:20]) or 'nothing'}."
        )
    config = settled(read_json(directory / "config.json"), directory)
    base = describe(model_id, directory, config, dtype=dtype, remat=remat, unroll=unroll)
    stored = bnb.scheme_in(config)
    if stored and quant and (stored.kind, stored.double or quant.double) != (quant.kind, stored.double):
        raise UserError(
            f"{directory} is quantised already, as {stored}, and `model.quant` asks for {quant}. Leave it None, or "
            "give the unquantised checkpoint."
        )
    quant = (stored and dataclasses.replace(stored, embedding=bool(quant and quant.embedding))) or quant
    if quant is not None:
        quant = dataclasses.replace(quant, never=getattr(table_of(config), "NEVER_QUANTISED", ()))
    if quant is not None and quant.kind == "nf4":
        for row in base.rows:
            if quant.takes(row.path):
                check_blocks(row.path, row.shape[axis_of(row)])
    return dataclasses.replace(base, quant=quant)


def describe(
    model_id: str, directory: Path, hf_config: dict[str, Any], *, dtype: str, remat: str = "none", unroll: int = 1
) -> Base:
    """The layout of a parsed config.json, wherever its weights are."""
    model = build(hf_config, dtype=jnp.dtype(dtype), remat=remat, unroll=unroll)
    ids = jnp.zeros((1, 2), jnp.int32)
    source = {"source_tokens": ids, "source_segments": ids} if is_encoder_decoder(hf_config) else {}
    abstract = abstract_params(model, ids, ids, ids, **source)
    rows = rows_of(hf_config, abstract)
    return Base(model_id, directory, hf_config, model, abstract, rows, sites_of(rows, tied=model.config.tied))


def settled(hf_config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A config.json with what the names of the checkpoint's tensors say about it, in families where they do."""
    if not is_encoder_decoder(hf_config) or not any(directory.glob("*.safetensors")):
        return hf_config
    return table_of(hf_config).settled(hf_config, stored_tensors(directory).keys())


def load_base(base: Base, mesh: Mesh, dtype: Callable[[str], Any], trained: Collection[str] = ()) -> Tree:
    """The base's parameters on the mesh; `dtype` gives each one's by path.

    Args:
      trained: paths of those that are not quantised, because they train.

    Raises:
      UserError: the checkpoint's tensors do not fit its config.
    """
    stored = stored_tensors(base.directory)
    check_tensors(base.rows, stored, base.directory, tied=base.model.config.tied)
    scheme = base.quant
    plain = [row for row in base.rows if not base.quantises(row.path) or row.path in trained]
    packed = next((name for row in plain for name in row.names if stored[name].beside is not None), None)
    if packed:
        raise UserError(
            f"{packed} is stored quantised in {base.directory}, and is to be trained, or is no linear layer. Give the "
            "unquantised checkpoint."
        )
    # The largest first, while nothing else is there.
    leaves: dict[str, Any] = dict(load_params(plain, stored, mesh, dtype))
    if scheme is not None:
        boxed = [row for row in base.rows if row.path not in leaves]
        leaves |= {row.path: load_box(row, stored, mesh, scheme, dtype(row.path)) for row in boxed}
    return tree.nest(leaves)


def lost_by_rounding(
    base: Base, mesh: Mesh, params: Mapping[str, Any], ranks: Mapping[str, int], dtype: Any
) -> dict[str, tuple[jax.Array, ...]]:
    """{path: (u [L, I, R], s [L, R], v [L, R, O])}: the R largest singular values of W less what became of it.

    Args:
      params: {path: box}.  ranks: R by path.  dtype: what W was cast to before it was quantised.

    Raises:
      UserError: the checkpoint itself is quantised, so that W is not there.
    """
    if not ranks:
        return {}
    stored, rows = stored_tensors(base.directory), {row.path: row for row in base.rows}
    if bnb.scheme_in(base.hf_config):
        raise UserError(
            f"init_lora_weights is loftq, and {base.directory} is stored quantised: what that lost is not there. Give "
            "the unquantised checkpoint with `model.quant`."
        )
    return {path: lost_of(rows[path], stored, mesh, params[path], rank, dtype) for path, rank in ranks.items()}
