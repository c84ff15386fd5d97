"""Multi-head latent attention (MLA) decode over the compressed, paged key-value cache of DeepSeek models."""

from mla_backend.decode import mla_decode
from mla_backend.dimensions import KV_LORA_RANK, QK_ROPE_HEAD_DIM
from mla_backend.operators import has_compiled_kernels, kernel_name
from mla_backend.schedule import DecodeSchedule

__all__ = ["KV_LORA_RANK", "QK_ROPE_HEAD_DIM", "DecodeSchedule", "has_compiled_kernels", "kernel_name", "mla_decode"]
