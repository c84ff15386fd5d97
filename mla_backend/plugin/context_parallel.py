"""Several query tokens of a request where its cached tokens are divided between ranks (decode context parallelism)."""

from __future__ import annotations

import torch


def cached_here(tokens: torch.Tensor, ranks: int, rank: int, interleave: int) -> torch.Tensor:
    """Return how many of a request's first `tokens` cached tokens lie on `rank`: `interleave` go to each in turn.

    As vLLM's get_dcp_local_seq_lens does, which copies the rank, a number, to the device first, and the host waits.
    """
    rounds, rest = tokens // (interleave * ranks), tokens % (interleave * ranks)
    return rounds * interleave + (rest - rank * interleave).clamp(0, interleave)


class TokensAsRequests:
    """A step's query tokens as requests of one token, in buffers at addresses that never change.

    Of the tokens that a rank has, each query of a request may see all, or all but some at the end, and which it is
    depends on what the other ranks have. A request of its own sees its whole length, so its length says it. What a
    request's tokens have in common is read once for each of them, as it is for each 128 query rows anyway, which is
    what a token has where the heads of all ranks of DeepSeek-V2 and V3 come together.
    """

    def __init__(self, max_tokens: int, ranks: int, rank: int, interleave: int, device: torch.device) -> None:
        self._division = (ranks, rank, interleave)
        self._query_start_loc = torch.arange(max_tokens + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._block_table: torch.Tensor | None = None  # as wide as vLLM's, which the first step shows

    def fill(
        self, tokens: int, block_table: torch.Tensor, seq_lens: torch.Tensor, query_start_loc: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Divide requests into query tokens, on the device and without a host synchronisation.

        Args:
            tokens: query tokens, those that pad the step included: they see nothing.
            block_table: [requests, max_pages] int32 page numbers on this rank.
            seq_lens: [requests] int32 cached tokens per request on all ranks together, this step's included.
            query_start_loc: [requests + 1] int32, as for `mla_decode`.

        Returns:
            The same for the query tokens: [tokens, max_pages], [tokens], on this rank, and [tokens + 1].
        """
        if self._block_table is None:
            self._block_table = block_table.new_zeros(len(self._seq_lens), block_table.shape[1])
        # Else index_select would put another buffer in its place.
        assert block_table.shape[1] == self._block_table.shape[1], "a builder's block tables are equally wide"
        token, ends = self._query_start_loc[:tokens], query_start_loc[1:]
        request = torch.searchsorted(ends, token, right=True, out_int32=True)
        padding = request >= len(ends)
        request.clamp_(max=len(ends) - 1)
        seen = (seq_lens[request] - (ends[request] - 1 - token)).clamp_(min=0).masked_fill_(padding, 0)
        self._seq_lens[:tokens] = cached_here(seen, *self._division)
        torch.index_select(block_table, 0, request, out=self._block_table[:tokens])
        return self._block_table[:tokens], self._seq_lens[:tokens], self._query_start_loc[: tokens + 1]
