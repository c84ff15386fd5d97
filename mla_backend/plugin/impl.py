"""Once per layer: writing the cache, and the decode call."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl
from vllm.v1.attention.backend import AttentionLayer, AttentionType

from mla_backend.decode import mla_decode
from mla_backend.dimensions import KV_LORA_RANK, QK_ROPE_HEAD_DIM
from mla_backend.plugin.metadata import HopperMLAMetadata


class HopperMLAImpl(MLACommonImpl[HopperMLAMetadata]):
    # vLLM merges what ranks find for their shares of a request by the logarithms of their softmax denominators.
    can_return_lse_for_decode: bool = True
    supports_dcp: bool = True
    supports_mtp_with_cp_non_trivial_interleave_size: bool = True
    supports_pcp: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla_args,
        )
        asked = {"alibi_slopes": alibi_slopes, "sliding_window": sliding_window, "logits_soft_cap": logits_soft_cap}
        asked = {name: value for name, value in asked.items() if value is not None}
        if asked or attn_type != AttentionType.DECODER:
            raise NotImplementedError(
                f"HOPPER_MLA serves plain causal decoder attention, but this layer asks for {asked or attn_type}; "
                f"choose another backend with --attention-backend."
            )
        # Queries stay in the model's dtype, also over a quantised cache.
        self.supports_quant_query_input = False

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write this step's tokens into the cache; on the CPU, for which vLLM has no operator, in PyTorch.

        What else the releases pass (see releases.py) is vLLM's own.
        """
        if not kv_cache.is_cpu:
            super().do_kv_cache_update(
                kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale, *args, **kwargs
            )
        elif kv_cache.numel() > 0:
            slots = slot_mapping.flatten()
            written = slots >= 0  # -1 marks padding
            tokens = torch.cat((kv_c_normed, k_pe.squeeze(1)), dim=-1)[: len(slots)]
            page_size = kv_cache.shape[1]
            kv_cache[slots[written] // page_size, slots[written] % page_size] = tokens[written]

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: HopperMLAMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend the absorbed queries of the decode tokens.

        Returns:
            [tokens, heads, 512] of the queries' dtype, and with decode context parallelism, where `heads` are those of
            all its ranks, [tokens, heads] fp32 natural logarithms of the softmax denominators.
        """
        decode = attn_metadata.decode
        assert decode is not None
        q_nope, q_pe = q if isinstance(q, tuple) else q.split((KV_LORA_RANK, QK_ROPE_HEAD_DIM), dim=-1)
        tensors = (q_nope, q_pe, kv_c_and_k_pe_cache, *decode.requests)
        options: dict[str, Any] = {"softmax_scale": self.scale, "schedule": decode.schedule}
        if decode.schedule.quantized:
            options["kv_scale"] = layer._k_scale
        if self.need_to_return_lse_for_decode:
            return mla_decode(*tensors, **options, return_lse=True)
        return mla_decode(*tensors, **options), None
