"""The sizes that the operation, its schedule and its kernels agree on. As in csrc/decode.h."""

KV_LORA_RANK = 512
"""Latent numbers of a cached token: keys and, at the same time, values."""

QK_ROPE_HEAD_DIM = 64
"""Rotary numbers of a cached token: keys only."""

HEAD_DIM = KV_LORA_RANK + QK_ROPE_HEAD_DIM

MAX_HEADS = 128

MAX_TOKENS = 65535
"""Query tokens in one call of the compiled kernels."""

TILE_TOKENS = 64
"""Cached tokens that a worker handles at a time: the unit in which requests are split."""

PARTIAL_ROWS = 64
"""Query rows (token and head) of a place for partial results, of which every multiprocessor has two."""

SHARE_NUMBERS = 8
"""What the schedule says of a worker's share, as so many int32."""


def max_pages(page_size: int) -> int:
    """Return how many pages of this size a request may have in the compiled kernels."""
    return 2**32 * (TILE_TOKENS // 2) ** 2 // page_size**2
