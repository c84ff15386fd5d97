"""Split scheduling: which worker (a thread block of the kernel) reads which cached tokens of which request."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_backend.dimensions import KV_LORA_RANK, PARTIAL_ROWS, SHARE_NUMBERS


@dataclass(frozen=True)
class ScheduleBuffers:
    """Memory for the schedules of up to `max_requests` requests, at addresses that never change.

    Attributes:
        shares: [multiprocessors, 8] int32, see `DecodeSchedule`.
        splits: [max_requests + 1] int32, see `DecodeSchedule`.
        partial_out: [multiprocessors, 2, 64, 512] fp32, or fp16 in half of it, and columns in another order, as
            csrc/decode.h says: a worker may hold a part of its first request and of its last.
        partial_lse: [multiprocessors, 2, 64] fp32, the base-2 logarithm of the parts' softmax denominators.
        arrivals: [multiprocessors] int32, at least one for each worker and block of query rows: how many parts of a
            request are there. 0 between calls.
    """

    shares: torch.Tensor
    splits: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(cls, max_requests: int, device: torch.device) -> ScheduleBuffers:
        """Allocate for `max_requests` requests; the CPU splits nothing and needs no partial results."""
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
        return cls(
            shares=torch.zeros(multiprocessors, SHARE_NUMBERS, dtype=torch.int32, device=device),
            splits=torch.zeros(max_requests + 1, dtype=torch.int32, device=device),
            partial_out=torch.empty(multiprocessors, 2, PARTIAL_ROWS, KV_LORA_RANK, dtype=torch.float32, device=device),
            partial_lse=torch.empty(multiprocessors, 2, PARTIAL_ROWS, dtype=torch.float32, device=device),
            arrivals=torch.zeros(multiprocessors, dtype=torch.int32, device=device),
        )

    @property
    def max_requests(self) -> int:
        return self.splits.shape[0] - 1


@dataclass(frozen=True)
class DecodeSchedule:
    """How the work of one decode step is divided; computed once per step and reused by every layer.

    Requests consist of tiles, each of `TILE_TOKENS` cached tokens. Where there are enough of the kernel's workers, one
    or two multiprocessors each, every request gets its own, as many as its length asks for. Else workers divide the
    tiles of all requests, laid end to end, into shares that cost nearly the same, and so may cross from one request
    into the next (csrc/sm90/plan.cuh says more). The partial results of a request that several workers share are
    combined. The CPU has no workers.

    Attributes:
        shares: [workers, 8] int32, on the device of the cache: what each worker does (`Share` in csrc/decode.h), those
            with later tiles first.
        splits: [requests + 1] int32, running count of the requests' partial results.
        buffers: where `shares`, `splits` and the partial results lie.
        heads: query heads, known to the host.
        max_query_len: upper bound on a request's query tokens, known to the host.
        max_seq_len: upper bound on a request's cached tokens, known to the host.
        batch_invariant: no request is split, and one kernel serves all query lengths, so that a request's results do
            not depend on what else is in the batch. Slower where there are fewer requests than workers.
        quantized: whether the cache is float8.
    """

    shares: torch.Tensor
    splits: torch.Tensor
    buffers: ScheduleBuffers
    heads: int
    max_query_len: int
    max_seq_len: int
    batch_invariant: bool = False
    quantized: bool = False

    @classmethod
    def plan(
        cls,
        seq_lens: torch.Tensor,
        *,
        heads: int,
        max_query_len: int,
        max_seq_len: int,
        batch_invariant: bool = False,
        quantized: bool = False,
        buffers: ScheduleBuffers | None = None,
    ) -> DecodeSchedule:
        """Divide a step's work over the workers, on the device of `seq_lens` and without a host synchronisation.

        Args:
            seq_lens: [requests] int32, cached tokens per request.
            heads: query heads, 1 to 128.
            max_query_len: upper bound on a request's query tokens; at most 65535 on a GPU.
            max_seq_len: upper bound on `seq_lens`. The kernel is chosen by this, the numbers of requests, heads and
                query tokens, `batch_invariant` and `quantized`, so a captured step must be replayed with schedules made
                with the same.
            batch_invariant, quantized: see `DecodeSchedule`.
            buffers: where the schedule is written, so that its addresses outlive the step (a CUDA graph replays with
                the addresses it was captured with); by default fresh memory.

        Raises:
            ValueError: there are more requests than `buffers` has room for.
            RuntimeError: `seq_lens` is no int32 tensor, or there are no such numbers of heads, query or cached tokens,
                where the compiled kernels make the schedule.
        """
        requests = seq_lens.shape[0]
        if buffers is None:
            buffers = ScheduleBuffers.allocate(requests, seq_lens.device)
        if requests > buffers.max_requests:
            raise ValueError(
                f"DecodeSchedule.plan: {requests} requests, but the buffers have room for {buffers.max_requests}; "
                f"allocate them with ScheduleBuffers.allocate(max_requests={requests}, ...)."
            )
        splits = buffers.splits[: requests + 1]
        bounds = (heads, max_query_len, max_seq_len)
        workers = torch.ops.mla_backend.plan(seq_lens, *bounds, batch_invariant, quantized, buffers.shares, splits)
        shares = buffers.shares[:workers]
        return cls(shares, splits, buffers, heads, max_query_len, max_seq_len, batch_invariant, quantized)
