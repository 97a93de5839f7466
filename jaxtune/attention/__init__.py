"""Attention: `causal` for a text read at once, chosen by platform and shape; `attend` for new tokens beside a cache."""

from jaxtune.attention.cache import Cache, Source
from jaxtune.attention.causal import causal
from jaxtune.attention.plain import (
    NO_WINDOW,
    Prefix,
    attend,
    heads_first,
    prefix_visible,
    rotate,
    together,
    visible,
    window_of,
)

__all__ = [
    "NO_WINDOW",
    "Cache",
    "Prefix",
    "Source",
    "attend",
    "causal",
    "heads_first",
    "prefix_visible",
    "rotate",
    "together",
    "visible",
    "window_of",
]
