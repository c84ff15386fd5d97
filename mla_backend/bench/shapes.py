"""The decode steps that are measured, and the time that no kernel can beat."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from mla_backend.dimensions import HEAD_DIM, KV_LORA_RANK


@dataclass(frozen=True)
class Shape:
    """A decode step: `seq_lens` cached tokens per request, each with `queries` query tokens of `heads` heads."""

    name: str
    heads: int
    queries: int
    seq_lens: tuple[int, ...]
    quantized: bool = False  # a cache of float8 numbers, of bfloat16 ones otherwise

    @property
    def bytes(self) -> int:
        """Bytes that must move at least: every cached token once; queries in and outputs out, in 16 bits."""
        rows = len(self.seq_lens) * self.queries * self.heads
        return (1 if self.quantized else 2) * sum(self.seq_lens) * HEAD_DIM + 2 * rows * (HEAD_DIM + KV_LORA_RANK)

    @property
    def flops(self) -> int:
        """Products and sums of the scores and of the output, without a causal mask."""
        return 2 * sum(self.seq_lens) * self.queries * self.heads * (HEAD_DIM + KV_LORA_RANK)

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Seconds that the machine needs at least, at the rates that were measured on it; products are of 16 bits."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def uniform(heads: int, queries: int, requests: int, length: int) -> Shape:
    name = f"{heads} heads, {queries} x {requests} x {length}"
    return Shape(name, heads, queries, (length,) * requests)


def mixed(heads: int, requests: int, mean: int) -> Shape:
    """Lengths of a normal distribution, with half the mean as its deviation; the same ones in every run."""
    rng = random.Random(mean)
    lengths = tuple(max(1, round(rng.gauss(mean, mean / 2))) for _ in range(requests))
    return Shape(f"{heads} heads, 1 x {requests} x ~{mean}", heads, 1, lengths)


FEW_HEADS = ((1, 4096), (1, 32768), (8, 4096), (32, 4096), (64, 8192), (16, 32768), (1, 131072))

DEFAULT = (
    *(uniform(16, 1, *rest) for rest in FEW_HEADS),
    *(uniform(64, 1, *rest) for rest in ((8, 4096), (64, 8192))),
    *(uniform(128, 1, *rest) for rest in ((1, 4096), (8, 4096), (32, 4096), (64, 8192), (16, 32768))),
    uniform(16, 4, 64, 8192),
    uniform(128, 2, 64, 8192),
    uniform(128, 4, 64, 8192),
    *(mixed(heads, 128, mean) for heads in (16, 128) for mean in (4096, 16384)),
    Shape("16 heads, 4 x 4 uneven", 16, 4, (4641, 45118, 1730, 1696)),
)

QUANTIZED = tuple(replace(shape, quantized=True) for shape in DEFAULT)

MOST_TOKENS = 1 << 24  # in the cache of a random shape: 19 GB


def anywhere(count: int, seed: int = 0) -> list[Shape]:
    """Return random shapes, the same ones for a seed: 8 to 128 heads, 1 to 256 requests of 100 to 100,000 tokens.

    Small numbers of requests and tokens are as likely as large ones: their logarithms are uniform.
    """
    rng = random.Random(seed)

    def log_uniform(low: int, high: int) -> int:
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    shapes: list[Shape] = []
    while len(shapes) < count:
        requests, length = log_uniform(1, 256), log_uniform(100, 100_000)
        if requests * length <= MOST_TOKENS:
            shapes.append(uniform(rng.randrange(8, 129, 8), 1, requests, length))
    return shapes


LINES: dict[str, list[tuple[int, Shape]]] = {
    "heads, with 16 x 8192": [(n, uniform(n, 1, 16, 8192)) for n in range(8, 129, 8)],
    **{
        f"tokens, with {heads} heads and {requests} requests": [
            (n, uniform(heads, 1, requests, n)) for n in (round(100 * 2 ** (i / 2)) for i in range(21))
        ]
        for heads in (16, 128)
        for requests in (1, 16)
    },
    **{
        f"requests, with {heads} heads and 4096 tokens": [
            (n, uniform(heads, 1, n, 4096)) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
        ]
        for heads in (16, 128)
    },
}
"""Shapes along which one number grows, and the time should grow without jumps."""
