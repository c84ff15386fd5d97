"""Split scheduling: which worker (a thread block of the kernel) reads which cached tokens of which request."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE_TOKENS = 64
"""Cached tokens that a worker handles at a time: the unit in which requests are split."""


@dataclass(frozen=True)
class DecodeSchedule:
    """The work of one decode step, divided evenly; computed once per step and reused by every layer.

    Lay the tiles of all requests end to end: request `r` owns tiles `request_tiles[r]:request_tiles[r + 1]`, each of
    `TILE_TOKENS` cached tokens, and worker `w` handles tiles `worker_tiles[w]:worker_tiles[w + 1]`. A worker may so
    cross from one request into the next, and a request may be split over several workers, whose partial results are
    combined. No two workers differ by more than one tile.

    Attributes:
        request_tiles: [requests + 1] int32, on the device of the cache.
        worker_tiles: [workers + 1] int32, on the same device.
        max_query_len: upper bound on a request's query tokens, known to the host.
        max_seq_len: upper bound on a request's cached tokens, known to the host.
    """

    request_tiles: torch.Tensor
    worker_tiles: torch.Tensor
    max_query_len: int
    max_seq_len: int

    @classmethod
    def plan(
        cls,
        seq_lens: torch.Tensor,
        *,
        max_query_len: int,
        max_seq_len: int,
        buffers: ScheduleBuffers | None = None,
    ) -> DecodeSchedule:
        """Divide a step's work over the workers, on the device of `seq_lens` and without a host synchronisation.

        Args:
            seq_lens: [requests] int32, cached tokens per request.
            max_query_len: upper bound on a request's query tokens.
            max_seq_len: upper bound on `seq_lens`.
            buffers: where the schedule is written, so that its addresses outlive the step (a CUDA graph replays with
                the addresses it was captured with); by default fresh memory.

        Raises:
            ValueError: there are more requests than `buffers` has room for.
        """
        requests = seq_lens.shape[0]
        if buffers is None:
            buffers = ScheduleBuffers.allocate(requests, seq_lens.device)
        if requests > buffers.max_requests:
            raise ValueError(
                f"DecodeSchedule.plan: {requests} requests, but the buffers have room for {buffers.max_requests}; "
                f"allocate them with ScheduleBuffers.allocate(max_requests={requests}, ...)."
            )
        request_tiles = buffers.request_tiles[: requests + 1]
        tiles = (seq_lens + (TILE_TOKENS - 1)) // TILE_TOKENS
        torch.cumsum(tiles, 0, dtype=torch.int32, out=request_tiles[1:])
        # total * worker overflows int32 from 2**31 / workers tiles on, so quotient and remainder are spread apart.
        total, workers = request_tiles[-1], buffers.worker_index.shape[0] - 1
        share, rest = total // workers, total % workers
        torch.add(buffers.worker_index * share, torch.minimum(buffers.worker_index, rest), out=buffers.worker_tiles)
        return cls(request_tiles, buffers.worker_tiles, max_query_len, max_seq_len)


@dataclass(frozen=True)
class ScheduleBuffers:
    """Memory for the schedules of up to `max_requests` requests, at addresses that never change.

    Attributes:
        request_tiles: [max_requests + 1] int32; the first entry is 0 and stays 0.
        worker_tiles: [workers + 1] int32.
        worker_index: [workers + 1] int32, the constant 0, 1, ..., workers.
    """

    request_tiles: torch.Tensor
    worker_tiles: torch.Tensor
    worker_index: torch.Tensor

    @classmethod
    def allocate(cls, max_requests: int, device: torch.device) -> ScheduleBuffers:
        """Allocate for `max_requests` requests, with one worker per multiprocessor (on the CPU: per thread)."""
        if device.type == "cuda":
            workers = torch.cuda.get_device_properties(device).multi_processor_count
        else:
            workers = torch.get_num_threads()
        index = torch.arange(workers + 1, dtype=torch.int32, device=device)
        return cls(
            request_tiles=torch.zeros(max_requests + 1, dtype=torch.int32, device=device),
            worker_tiles=torch.zeros_like(index),
            worker_index=index,
        )

    @property
    def max_requests(self) -> int:
        return self.request_tiles.shape[0] - 1
