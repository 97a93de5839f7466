"""What of a layer the backward pass finds kept, and what it computes again: `train.remat` by name.

More is kept from `full` to `none`, and less computed twice.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from jaxtune.attention.plain import NAME as ATTENTION
from jaxtune.layers import PRODUCT

# The name of what a layer begins with.
LAYER = "layer_in"

_POLICIES = jax.checkpoint_policies
POLICIES: dict[str, Any] = {
    # Every layer's input alone.
    "full": None,
    # Those inputs in the host's memory: for depth and length beyond the chip's, where the way there is wide enough.
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # And what attention gives: [B, T, N*H] a layer spares its kernel's second run.
    "attn_out": _POLICIES.save_only_these_names(ATTENTION),
    # And what each linear layer gives: nothing large is multiplied again but attention's scores.
    "dots": _POLICIES.save_only_these_names(ATTENTION, PRODUCT),
}
NAMES = ("full", "none", *(name for name in POLICIES if name != "full"))


def rematerialised(layer: type[nn.Module], name: str, unroll: int = 1) -> type[nn.Module]:
    """The class of a layer that is scanned, `unroll` at a time, under the policy of this name; `none` keeps everything.

    Raises:
      KeyError: a name that is not in `NAMES`.
    """
    if name == "none":
        return layer
    # Outside a loop XLA could merge the second run with the first, and so keep what was to be computed again.
    return nn.remat(layer, prevent_cse=unroll > 1, policy=POLICIES[name])


def entered(x: jax.Array) -> jax.Array:
    """A layer's input, by its name."""
    return checkpoint_name(x, LAYER)
