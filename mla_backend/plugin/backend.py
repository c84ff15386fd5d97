"""What the backend supports, as vLLM asks it."""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import MultipleOf

import mla_backend
from mla_backend.dimensions import HEAD_DIM, KV_LORA_RANK, QK_ROPE_HEAD_DIM
from mla_backend.plugin import releases
from mla_backend.plugin.impl import HopperMLAImpl
from mla_backend.plugin.metadata import HopperMLAMetadataBuilder

HOPPER = DeviceCapability(9, 0)


class HopperMLABackend(MLACommonBackend):
    """Decode over the latent cache with `mla_decode`; prefill is vLLM's own."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "bfloat16", "float16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_name() -> str:
        return releases.NAME

    @staticmethod
    def get_impl_cls() -> type[HopperMLAImpl]:
        return HopperMLAImpl

    @staticmethod
    def get_builder_cls() -> type[HopperMLAMetadataBuilder]:
        return HopperMLAMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [HEAD_DIM]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        # What the kernels take; vLLM divides pages of other sizes into these.
        return [16, 32, MultipleOf(64)] if current_platform.is_cuda() else [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        # Pages may be any distance apart, so those of all layers may lie together (asked up to 0.28).
        return (1, 0, 2, 3) if include_num_layers_dimension else (0, 1, 2)

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        # fp32 only where vLLM's prefill takes it too.
        return dtype in cls.supported_dtypes or (dtype == torch.float32 and current_platform.is_cpu())

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: CacheDType | None) -> bool:
        # On the CPU vLLM's prefill takes no float8 cache.
        quantized = kv_cache_dtype is not None and kv_cache_dtype.startswith("fp8")
        return super().supports_kv_cache_dtype(kv_cache_dtype) and not (quantized and current_platform.is_cpu())

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability | None) -> bool:
        # Other makers' GPUs have capabilities of their own, or none.
        return bool(current_platform.is_cpu() or (current_platform.is_cuda() and capability == HOPPER))

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return bool(current_platform.is_cuda())  # by the schedule; nobody looked at the CPU's matrix products

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # The schedule's bound on query lengths comes from the host's copy.
        return False

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: CacheDType | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability | None,
    ) -> str | None:
        if current_platform.is_cuda() and not mla_backend.has_compiled_kernels():
            return (
                "this installation of mla_backend has no compiled kernels; reinstall it with MLA_BACKEND_CUDA=1, which "
                "says what is missing"
            )
        if kv_cache_dtype in ("bfloat16", "float16") and str(dtype) != f"torch.{kv_cache_dtype}":
            return f"a {kv_cache_dtype} cache needs a model in {kv_cache_dtype}, not {dtype}"
        return None

    @classmethod
    def describe_support(cls) -> str:
        """Say in words what the backend serves on this platform."""
        dtypes = [dtype for dtype in (*cls.supported_dtypes, torch.float32) if cls.supports_dtype(dtype)]
        caches = filter(cls.supports_kv_cache_dtype, cls.supported_kv_cache_dtypes)
        return (
            f"dense MLA decoders with head_size {HEAD_DIM} ({KV_LORA_RANK} latent + {QK_ROPE_HEAD_DIM} rotary), dtype "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, kv_cache_dtype "
            f"{', '.join(caches)}, block_size a multiple of 16, a Hopper GPU (compute "
            f"capability {HOPPER.major}.{HOPPER.minor}) or the CPU"
        )

    @classmethod
    def describe_kernel(cls) -> str:
        """Say in words what computes the attention on this platform."""
        return f"mla_decode by {mla_backend.kernel_name(torch.device(current_platform.device_type))}"
