"""A row of a Hugging Face table, read both ways.

`('model.layers.{i}.self_attn.q_proj.weight', 'O I -> I O')` says which tensor a parameter comes from and goes to, how
it is turned, and what PEFT calls its module.  Weights and adapters read the same rows.
"""

import dataclasses
from typing import Any

import flax.linen as nn

from jaxtune import tree
from jaxtune.models import table_of
from jaxtune.peft.method import Site
from jaxtune.typing import Tree


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its path here, its tensors there."""

    path: str  # layers/attn/q/kernel
    names: tuple[str, ...]  # one tensor per layer, or the single one
    transposed: bool
    stacked: bool  # the parameter has a leading layer axis
    shape: tuple[int, ...]  # of the parameter, layer axis included
    axes: tuple[str, ...]  # logical, layer axis included

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of each tensor in the checkpoint."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def rows_of(hf_config: dict[str, Any], abstract: Tree) -> list[Row]:
    """The rows of a model whose boxed abstract parameters are given (`layers.abstract_params`)."""
    table = table_of(hf_config).rows(hf_config)
    boxes = tree.flatten(abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    rows = []
    for path, box in boxes.items():
        name, turn = table[path]
        stacked = "{i}" in name
        names = tuple(name.format(i=i) for i in range(box.value.shape[0])) if stacked else (name,)
        rows.append(Row(path, names, "->" in turn, stacked, tuple(box.value.shape), tuple(box.names)))
    return rows


def sites_of(rows: list[Row], *, tied: bool) -> list[Site]:
    """Where an adapter can be put: one site a parameter, named by its modules; a tied head is a site of its own."""
    sites = []
    for row in rows:
        modules = tuple(n.removesuffix(".weight") for n in row.names)
        sites.append(Site(row.path, modules, row.shape, row.axes, kind_of(row.path, modules[0])))
    if tied:
        table = next(s for s in sites if s.path == "embed/table")
        sites.append(table._replace(path="lm_head/table", modules=("lm_head",), kind="head"))
    return sites


def kind_of(path: str, name: str) -> str:
    """What a parameter is, by its path and its module's name."""
    if path.endswith("/kernel"):
        return "linear"
    if path.endswith("relative_bias/table"):
        return "bias"
    if path == "embed/table":
        return "shared" if name == "shared" else "embedding"
    return "head" if path == "lm_head/table" else "norm"
