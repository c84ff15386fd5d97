"""A few small steps that reach every path through the kernels, for tools that slow them down a thousand times."""

from __future__ import annotations

from typing import Any

import torch
from test_kernel import Step

from mla_backend import mla_decode

STEPS: list[dict[str, Any]] = [
    {"heads": 16},
    {"heads": 16, "seq_lens": [9000], "query_lens": [1]},  # split over many workers
    {"heads": 32, "page_size": 16, "dtype": torch.float16},
    {"heads": 20, "page_size": 32, "query_padding": 1},
    {"heads": 64, "query_padding": 8},
    {"heads": 40, "query_lens": [1, 2, 0, 3], "query_padding": 1, "padding_rows": 2},
    {"heads": 128, "page_size": 128, "dtype": torch.float16},
    {"heads": 128, "seq_lens": [2500], "query_lens": [3], "causal": False},
    *({"heads": heads, "seq_lens": [700] * 2, "query_lens": [1] * 2} for heads in (16, 64, 128)),  # by helpers, too
    {"heads": 128, "seq_lens": [300] * 9, "query_lens": [1] * 9},  # more than 1024 query rows
    {"heads": 16, "seq_lens": [70] * 140, "query_lens": [1] * 140},  # more requests than a warp holds the tiles of
    {"heads": 16, "seq_lens": [70] * 140, "query_lens": [1] * 140, "batch_invariant": True},
    {"heads": 40, "seq_lens": [70, 300] * 40, "query_lens": [1] * 80},  # many short requests
    {"heads": 64, "seq_lens": [512] + [0] * 70, "query_lens": [1] * 71},
    # Over a quantised cache.
    {"heads": 16, "quantized": True},
    *({"heads": heads, "seq_lens": [9000], "query_lens": [1], "quantized": True} for heads in (16, 40)),
    {"heads": 20, "page_size": 32, "query_padding": 1, "quantized": True},
    {"heads": 40, "query_lens": [1, 2, 0, 3], "padding_rows": 2, "dtype": torch.float16, "quantized": True},
    {"heads": 128, "page_size": 16, "quantized": True},
    {"heads": 81, "seq_lens": [2500], "query_lens": [3], "causal": False, "quantized": True},
    {"heads": 126, "query_padding": 1, "dtype": torch.float16, "quantized": True},
    *(
        {"heads": heads, "seq_lens": [300, 700] * 70, "query_lens": [1] * 140, "quantized": True}
        for heads in (16, 32, 64, 128)
    ),
    # Split, and completed by the workers with the first parts.
    *({"heads": heads, "seq_lens": [300, 700] * 70, "query_lens": [1] * 140} for heads in (16, 32, 64, 128)),
    # Combined by all, by one worker with parts of two requests.
    *(
        {"heads": heads, "seq_lens": [9000] + [64] * 140 + [9000] * 2, "query_lens": [1] * 143}
        for heads in (16, 32, 64, 128)
    ),
]


def main() -> None:
    for options in STEPS:
        step = Step(**{"seq_lens": [150, 64, 0, 700], "query_lens": [1, 1, 1, 1], **options})
        mla_decode(**step.arguments(), return_lse=True)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
