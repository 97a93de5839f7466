"""Attention of a text that is read at once: one function, and the implementation that fits platform and shape.

B batch, T length, N query heads, K kv heads, H head dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxtune.attention.blocks import by_blocks
from jaxtune.attention.mosaic import mosaic, serves
from jaxtune.attention.plain import NAME, Prefix, window_of
from jaxtune.attention.splash import splash
from jaxtune.mesh import platform

# Up to this length one program serves layers with any window: what a window spares is little.
PLAIN = 512
PLAIN_ON_TPU = 128


def causal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    segments: Int[Array, "B T"],
    *,
    windows: Sequence[int | None],
    kind: Int[Array, ""],
    scale: float,
    softcap: float | None,
    prefix: Prefix | None = None,
) -> Float[Array, "B T N H"]:
    """Each real token to those of its segment at or before it.  Equals `attend` with `visible`.

    Args:
      windows: the windows that layers have, each once; None: global.  kind: which of them this layer has.
      prefix: keys before every text, which the kernel for TPUs does not know; blocks do.
    """
    T, how = q.shape[1], {"scale": scale, "softcap": softcap}
    window = window_of(windows, kind)
    on_tpu = platform() == "tpu" and prefix is None
    if (PLAIN_ON_TPU if on_tpu else PLAIN) >= T:
        return by_blocks(q, k, v, segments, window=window, prefix=prefix, **how)

    if prefix is None and serves(q.dtype):
        return checkpoint_name(mosaic(q, k, v, segments, window, **how), NAME)

    def over(window: int | None) -> Callable[..., Any]:
        if on_tpu:
            return lambda *x: splash(*x, window=window, **how)
        return lambda *x: by_blocks(*x, window=window, prefix=prefix, **how)

    # A window that this text does not outgrow is none: layers are of two kinds for a long text alone.
    there = [None if w is None or w >= T else w for w in windows]
    different = list(dict.fromkeys(there))
    if len(different) == 1:
        return over(different[0])(q, k, v, segments)
    branch = jnp.asarray(np.array([different.index(w) for w in there], np.int32))[kind]
    return jax.lax.switch(branch, [over(w) for w in different], q, k, v, segments)
