"""Trees addressed by paths: `layers/attn/q/kernel`.

Everything that picks, counts, saves or exports leaves does so by path.  A tree is taken apart into a flat dict and put
together again with the structure it came from.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxtune.typing import Tree


def path_of(keys: Iterable[Any]) -> str:
    """'params/layers/attn/q/kernel' of a key path as jax gives it."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def flatten(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """{path: leaf}."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def unflatten(like: Tree, leaves: dict[str, Any]) -> Tree:
    """The tree of `like`'s structure whose leaves are looked up by path.

    Raises:
      KeyError: a leaf of `like` is not in `leaves`.
    """
    return jax.tree_util.tree_map_with_path(lambda keys, _: leaves[path_of(keys)], like)


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """{'a/b': x} -> {'a': {'b': x}}."""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return root


def count(tree: Tree) -> int:
    """Number of values in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
