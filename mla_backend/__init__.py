"""Multi-head latent attention (MLA) decode over the compressed, paged key-value cache of DeepSeek models."""

from mla_backend.decode import KV_LORA_RANK, QK_ROPE_HEAD_DIM, kernel_name, mla_decode
from mla_backend.schedule import DecodeSchedule

__all__ = ["KV_LORA_RANK", "QK_ROPE_HEAD_DIM", "DecodeSchedule", "kernel_name", "mla_decode"]
