"""Once per step: block tables, lengths and the schedule, in buffers that a CUDA graph can replay with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed import get_dcp_group
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonDecodeMetadata,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import AttentionSpec

from mla_backend.plugin.context_parallel import TokensAsRequests
from mla_backend.schedule import DecodeSchedule, ScheduleBuffers


@dataclass
class HopperMLADecodeMetadata(MLACommonDecodeMetadata):
    """What the decode call of every layer needs.

    vLLM's own block table and lengths stay as they are: it looks at them when it merges what ranks have found.

    Attributes:
        requests: block table, cached tokens and query_start_loc of what is attended, as `mla_decode` takes them.
        schedule: of these requests.
    """

    requests: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    schedule: DecodeSchedule


class HopperMLAMetadata(MLACommonMetadata[HopperMLADecodeMetadata]):
    pass


class HopperMLAMetadataBuilder(MLACommonMetadataBuilder[HopperMLAMetadata]):
    # Lengths, block tables and the schedule are read on the device, so a captured decode batch replays with any other
    # of its shape. Batches with prefills cannot be captured: vLLM's own prefill is not capturable.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN
    # Prefills of up to 128 tokens go the decode way: they share one launch with the decodes.
    reorder_batch_threshold: int = 128

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        parallel = vllm_config.parallel_config
        if parallel.decode_context_parallel_size > 1:
            # Query tokens become requests of their own, which pays for speculated ones, for which vLLM raises the
            # threshold, and not for prefills.
            self.reorder_batch_threshold = 1
        super().__init__(
            kv_cache_spec, layer_names, vllm_config, device, HopperMLAMetadata, supports_dcp_with_varlen=True
        )
        if envs.VLLM_BATCH_INVARIANT:
            # Whether a prefill's last tokens go the decode way would depend on how the batch cut it into chunks.
            self.reorder_batch_threshold = 1
        max_requests = vllm_config.scheduler_config.max_num_seqs
        self._tokens: TokensAsRequests | None = None
        if self.dcp_world_size > 1 and vllm_config.speculative_config is not None:
            # In every step: with a single query, too, a rank's lengths may count speculated tokens that were rejected,
            # where vLLM finds them on the host.
            max_requests *= self.reorder_batch_threshold
            rank = get_dcp_group().rank_in_group
            division = (self.dcp_world_size, rank, parallel.cp_kv_cache_interleave_size)
            self._tokens = TokensAsRequests(max_requests, *division, device)
        self._schedule_buffers = ScheduleBuffers.allocate(max_requests, device)
        self._quantized = kv_cache_spec.dtype.itemsize == 1
        self._heads = self.num_heads * self.dcp_world_size  # vLLM brings those of all ranks together
        # The kernel is chosen by a bound on lengths, and what was captured with one is replayed with other lengths.
        rounds = -(-vllm_config.model_config.max_model_len // self.dcp_virtual_block_size)
        self._max_seq_len = rounds * self.dcp_local_block_size if device.type == "cuda" else None

    def _build_decode(
        self,
        block_table_tensor: torch.Tensor,
        seq_lens_device: torch.Tensor,
        max_seq_len: int,
        query_start_loc_cpu: torch.Tensor,
        query_start_loc_device: torch.Tensor,
        num_decode_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> HopperMLADecodeMetadata:
        """Build the decode part; what else the releases pass (see releases.py) is not needed here."""
        table, lengths, starts = block_table_tensor, seq_lens_device, query_start_loc_device
        max_query_len = int(query_start_loc_cpu.diff().max())
        if self._tokens is not None:
            whole = kwargs["dcp_tot_seq_lens_device"]
            table, lengths, starts = self._tokens.fill(num_decode_tokens, table, whole, starts)
            max_query_len = 1
        return HopperMLADecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=None,
            requests=(table, lengths, starts),
            schedule=DecodeSchedule.plan(
                lengths,
                heads=self._heads,
                max_query_len=max_query_len,
                max_seq_len=self._max_seq_len or max_seq_len,
                batch_invariant=envs.VLLM_BATCH_INVARIANT,
                quantized=self._quantized,
                buffers=self._schedule_buffers,
            ),
        )
