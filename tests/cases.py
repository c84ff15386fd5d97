"""Random inputs of `mla_decode` that hold everything its contract allows, and poison where it must not look."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from mla_backend import DecodeSchedule

HEAD_DIM, RANK = 576, 512


@dataclass
class Case:
    """The shape of a decode step; `inputs` makes the tensors."""

    seq_lens: list[int]
    query_lens: list[int]
    heads: int = 16
    page_size: int = 64
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    causal: bool = True
    deviation: float = 1.0
    padding_rows: int = 0
    page_padding: int = 0
    seed: int = 0
    device: str = "cpu"
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * self.deviation

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of `mla_decode`, with NaN and garbage wherever it must not read."""
        requests, tokens = len(self.seq_lens), sum(self.query_lens) + self.padding_rows
        pages_of = [-(-length // self.page_size) for length in self.seq_lens]
        used = sum(pages_of)
        numbers = torch.randperm(used + 3, generator=self.generator)[:used]

        cache_dtype = self.cache_dtype or self.dtype
        storage = torch.full((used + 3, self.page_size * HEAD_DIM + self.page_padding), torch.nan).to(cache_dtype)
        kv_cache = storage[:, : self.page_size * HEAD_DIM].unflatten(1, (self.page_size, HEAD_DIM))
        block_table = torch.full((requests, max(pages_of, default=0) + 2), 2**31 - 1, dtype=torch.int32)
        scale = 0.25 if cache_dtype == torch.float8_e4m3fn else 1.0
        first = 0
        for request, length in enumerate(self.seq_lens):
            mine = numbers[first : first + pages_of[request]]
            first += len(mine)
            block_table[request, : len(mine)] = mine.int()
            for i, page in enumerate(mine.tolist()):
                rows = min(self.page_size, length - i * self.page_size)
                kv_cache[page, :rows] = (self.normal(rows, HEAD_DIM) / scale).to(cache_dtype)

        query = self.normal(tokens, self.heads, HEAD_DIM).to(self.dtype)
        query[tokens - self.padding_rows :] = torch.nan
        seq_lens = torch.tensor(self.seq_lens, dtype=torch.int32)
        query_start_loc = torch.tensor([0, *self.query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        tensors = {
            "q_nope": query[..., :RANK],
            "q_pe": query[..., RANK:],
            "kv_cache": kv_cache,
            "block_table": block_table,
            "seq_lens": seq_lens,
            "query_start_loc": query_start_loc,
            "kv_scale": torch.tensor(scale) if cache_dtype == torch.float8_e4m3fn else None,
        }
        tensors = {name: None if t is None else t.to(self.device) for name, t in tensors.items()}
        schedule = DecodeSchedule.plan(
            tensors["seq_lens"],
            heads=self.heads,
            max_query_len=max(self.query_lens, default=0),
            max_seq_len=max(self.seq_lens, default=0),
            quantized=cache_dtype == torch.float8_e4m3fn,
        )
        return {**tensors, "schedule": schedule, "softmax_scale": 192**-0.5, "causal": self.causal}
