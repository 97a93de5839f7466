"""Frozen weights in fewer bits: boxes that stand where arrays stood (`box`), and the formats (`nf4`, `int8`)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import mesh as meshes
from jaxtune.errors import UserError
from jaxtune.quant import int8, nf4
from jaxtune.quant.box import Quantised, spec
from jaxtune.quant.int8 import Int8
from jaxtune.quant.nf4 import NF4

__all__ = ["KINDS", "NF4", "Int8", "Quantised", "Scheme", "scheme_of"]

KINDS = ("nf4", "int8")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Which weights are quantised, and how.  kind: nf4 | int8; double: NF4's scales too; embedding: that table too;
    never: ends of paths that the family keeps as they are."""

    kind: str
    double: bool = False
    embedding: bool = False
    never: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.kind + " with double quantisation" * self.double + " and a quantised embedding" * self.embedding

    def takes(self, path: str) -> bool:
        """Whether it quantises the parameter at this path: all linear layers but the head, as transformers does."""
        linear = path.endswith("/kernel") and not path.endswith(self.never)
        return linear or (self.embedding and path == "embed/table")

    def quantise(self, w: Any, axis: int) -> Quantised:
        """One weight without layer axis.  axis: the one along which a scale holds, -2 of a kernel, -1 of a table."""
        return nf4.quantise(w, double=self.double, axis=axis) if self.kind == "nf4" else int8.quantise(w, axis=axis)

    def shardings(
        self, mesh: meshes.AnyMesh, name: str, axes: Sequence[str], shape: Sequence[int], axis: int
    ) -> Quantised:
        """The box of a weight without layer axis, of shardings.

        Raises:
          UserError: a size that has no whole blocks, or that the mesh would cut within one.
        """
        along = 2 + axis
        if self.kind == "int8":
            where = meshes.spec(mesh, axes, shape)
            return Int8(NamedSharding(mesh, where), NamedSharding(mesh, PartitionSpec(where[1 - along])), axis=axis)
        check_blocks(name, shape[along])
        where, whole = NamedSharding(mesh, spec(mesh, name, axes, shape, along, nf4.BLOCK)), meshes.replicated(mesh)
        return NF4(where, where, whole, whole, axis=axis) if self.double else NF4(where, where, axis=axis)


def check_blocks(name: str, size: int) -> None:
    """Refuses a weight that has no whole blocks.

    Raises:
      UserError: naming the nearest sizes.
    """
    if size % nf4.BLOCK:
        low = size // nf4.BLOCK * nf4.BLOCK
        raise UserError(
            f"`model.quant` is nf4, and {name} has {size} inputs. NF4 needs a multiple of {nf4.BLOCK} "
            f"({low or nf4.BLOCK} or {low + nf4.BLOCK}). Set `model.quant` to int8 or None."
        )


def scheme_of(kind: str | None, double: bool = False, embedding: bool = False) -> Scheme | None:
    """The scheme of a config's `model` section.

    Raises:
      UserError: an unknown kind, or settings of another.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"`model.quant` is {kind!r}. It can be: None, {', '.join(KINDS)}. QLoRA's four bits are nf4.")
    for key, value in (("double_quant", double and kind != "nf4"), ("quant_embedding", embedding and kind is None)):
        if value:
            raise UserError(f"`model.{key}` is set, and `model.quant` is {kind}. Set `model.quant` to nf4.")
    return None if kind is None else Scheme(kind, double, embedding)
