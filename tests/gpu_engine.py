"""Settings of vLLM engines on GPUs that all start at once: what they do takes seconds, starting one most of a minute.

The size of the cache is fixed by run_engine, so none measures how much memory the others leave; what they must find
free is small. FlashInfer's samplers and tuning only cost time here.
"""

from __future__ import annotations

from typing import Any

OTHERS: dict[str, str | None] = {"OMP_NUM_THREADS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
OURS = {**OTHERS, "VLLM_ATTENTION_BACKEND": "HOPPER_MLA"}
ON_RAY = {**OURS, "RAY_DEDUP_LOGS": "0"}
"""Environments, of other backends and of ours."""

BESIDE: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "gpu_memory_utilization": 0.05,
    "enable_flashinfer_autotune": False,
}
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
    },
}

GAP = 0.15  # in log-probability: rounding in bf16 makes about 0.05
