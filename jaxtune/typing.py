"""The letters of shapes, used in every annotation and einsum of this library.

B batch, T query length, S key length, D width, F hidden, N query heads, K kv heads, G = N/K, H head dim, V vocabulary,
L layers, R rank, P prompt length, A accumulation steps.  Logical axes are words: batch length embed heads kv_heads
head_dim mlp vocab layers rank.
"""

from typing import Any

# A pytree of arrays (or of shapes, shardings, ...) addressed by paths such as `layers/attn/q/kernel`.
Tree = Any
