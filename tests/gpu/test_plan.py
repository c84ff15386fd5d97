"""The schedule on a GPU: every tile is somebody's, nobody has too many, and parts of a request follow each other."""

from __future__ import annotations

import random

import pytest
import torch

from mla_backend import DecodeSchedule
from mla_backend.dimensions import TILE_TOKENS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Piece = tuple[int, int, int, int]  # worker, first tile of the request, past the last, place for a partial result


def plan(
    seq_lens: list[int], heads: int, max_query_len: int, batch_invariant: bool
) -> tuple[list[list[int]], list[int]]:
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")
    schedule = DecodeSchedule.plan(
        lengths,
        heads=heads,
        max_query_len=max_query_len,
        max_seq_len=max(seq_lens, default=0),
        batch_invariant=batch_invariant,
    )
    return schedule.shares.tolist(), schedule.splits.tolist()


def pieces_of_requests(shares: list[list[int]], tiles: list[int]) -> list[list[Piece]]:
    """Follow every worker through its share, as csrc/sm90/work.cuh does."""
    pieces: list[list[Piece]] = [[] for _ in tiles]
    for worker, (request, first_tile, left, slot, *_) in enumerate(shares):
        while left > 0:
            if tiles[request] > 0:
                last_tile = min(tiles[request], first_tile + left)
                whole = (first_tile, last_tile) == (0, tiles[request])
                pieces[request].append((worker, first_tile, last_tile, -1 if whole else slot))
                slot += not whole
                left -= last_tile - first_tile
            request, first_tile = request + 1, 0
    # Shares of later workers come first.
    return [sorted(mine, key=lambda piece: piece[1]) for mine in pieces]


def workers_of_their_own(tiles: list[int], workers: int, uneven_cost: int, whole_cost: int) -> list[int] | None:
    """How many of so many workers every request gets if none has tiles of two, or None if that is too uneven.

    Of limits to a worker's tiles, the lowest that there are workers enough for.
    """
    even_share = max(1, sum(tiles) // workers)
    for most in range(even_share, even_share + max(uneven_cost, whole_cost) + 1):
        counts = [-(-count // most) for count in tiles]
        split = sum(count > 1 for count in counts)
        if 0 < sum(counts) <= workers and most <= even_share + (uneven_cost if split else whole_cost):
            return counts
    return None


def check_balance(
    shares: list[list[int]], tiles: list[int], most_parts: int, query_rows: int, many_short: bool
) -> bool:
    """No share costs more than the others by more than a tile and the beginning of a request, or than parts cost.

    Returns whether requests, of most_parts or fewer, have workers of their own.
    """
    # As in csrc/launch.cu.
    of_kernels = {32: (1, 1, 4, 13, 1), 64: (1, 2, 4, 4, 3) if many_short else (2, 3, 10, 10, 2)}
    of_kernel = next((numbers for rows, numbers in of_kernels.items() if query_rows <= rows), (2, 3, 5, 5, 2))
    least_share, begin_cost, uneven_cost, whole_cost, split_cost = of_kernel
    total, begun = sum(tiles), sum(count > 0 for count in tiles)
    workers = max(1, min(len(shares), max(min(total, len(shares) // 2), total // least_share)))
    own_workers = workers_of_their_own(tiles, workers, uneven_cost, whole_cost)
    if most_parts and own_workers:
        mine = pieces_of_requests(shares, tiles)
        assert [len(pieces) for pieces in mine] == own_workers
        assert len({worker for pieces in mine for worker, *_ in pieces}) == sum(own_workers)
        for pieces in mine:
            sizes = [last - first for _, first, last, _ in pieces]
            assert max(sizes, default=0) <= min(sizes, default=0) + 1
        return True
    if own_workers and sum(own_workers) <= len(shares) // 4:
        split_cost = max(1, split_cost // 3)
    elif not own_workers:
        split_cost *= 2
    costs = [share[2] for share in shares]
    for mine in pieces_of_requests(shares, tiles):
        if mine:
            costs[mine[0][0]] += begin_cost
    even_share = (total + begun * begin_cost) // workers
    if own_workers:
        even_share = max(-(-mine // max(1, count)) for mine, count in zip(tiles, own_workers, strict=True))
    assert max(costs) <= even_share + begin_cost + (1 if most_parts else split_cost)
    return False


def check_helpers(shares: list[list[int]], parts_of: list[int]) -> int:
    """Every part has equally many helpers, or nearly so; those of a request count on from its parts, as do their slots.

    Returns how many there are.
    """
    first_slots = {share[0]: share[3] for share in shares if share[2] > 0 and share[5] > 0 and share[5] & 0xFFFF == 0}
    said = {share[0]: share[6] >> 16 for share in shares if share[5] > 0}
    numbers: dict[int, list[int]] = {request: [] for request in said}
    for request, _, count, slot, _, parts, others, _ in shares:
        if parts > 0:
            assert said[request] == others >> 16
        if count == 0 and parts > 0:
            assert parts >> 16 == parts_of[request]
            assert slot == first_slots[request] + (parts & 0xFFFF)
            numbers[request].append((parts & 0xFFFF) - parts_of[request])
    helpers = sum(map(len, numbers.values()))
    for request, mine in numbers.items():
        assert sorted(mine) == list(range(said[request]))
        assert abs(len(mine) - helpers * parts_of[request] / sum(parts_of)) < 1
    return helpers


def lengths_of(rng: random.Random) -> list[int]:
    requests = rng.choice([0, 1, 2, 4, 7, 20, 64, 131, 132, 133, 500, 1024, 1025, 2500])
    longest = rng.choice([1, 64, 65, 1000, 20000, 200000])
    if rng.random() < 0.3:
        return [rng.randint(0, longest)] * requests
    return [rng.choice([0, rng.randint(0, longest), rng.randint(0, longest)]) for _ in range(requests)]


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("heads", "max_query_len"), [(1, 1), (16, 1), (16, 4), (128, 1), (128, 3), (100, 50)])
def test_every_tile_is_given_once_and_evenly(heads: int, max_query_len: int, batch_invariant: bool) -> None:
    rng = random.Random(f"{heads} {max_query_len} {batch_invariant}")
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for _ in range(60):
        seq_lens = lengths_of(rng)
        tiles = [-(-length // TILE_TOKENS) for length in seq_lens]
        shares, splits = plan(seq_lens, heads, max_query_len, batch_invariant)
        assert 1 <= len(shares) <= multiprocessors

        slots, most_parts, parts_of = 0, 0, []
        expected = [[0, 0, 0] for _ in shares]  # part, parts, last parts
        for request, mine in enumerate(pieces_of_requests(shares, tiles)):
            assert [first for _, first, _, _ in mine] == [0, *(last for _, _, last, _ in mine)][: len(mine)]
            assert (mine[-1][2] if mine else 0) == tiles[request]
            parts = [slot for *_, slot in mine if slot >= 0]
            assert len(mine) <= 1 or not batch_invariant
            assert parts == ([] if len(mine) <= 1 else list(range(slots, slots + len(mine))))
            assert splits[request : request + 2] == [slots, slots + len(parts)]
            slots, most_parts = slots + len(parts), max(most_parts, len(parts))
            parts_of.append(len(parts))
            assert not parts or [worker for worker, *_ in mine] == list(range(mine[0][0], mine[0][0] - len(mine), -1))
            for part, (worker, *_) in enumerate(mine if parts else []):
                if shares[worker][0] == request:
                    expected[worker][:2] = [part, len(parts)]
                else:
                    expected[worker][2] = len(parts)
        for share, (part, parts_of_first, last_parts) in zip(shares, expected, strict=True):
            helps = share[2] == 0 and share[5] > 0
            assert helps or share[5] == part | parts_of_first << 16
            assert share[6] & 0xFFFF == last_parts
            assert share[7] & 1 == (sum(tiles) < 3072)
        assert slots <= 2 * len(shares)

        assert all(share[4] == seq_lens[share[0]] for share in shares if share[2])
        helpers = check_helpers(shares, parts_of)
        if not batch_invariant:
            many_short = 32 < heads * max_query_len <= 64 and len(seq_lens) > 66 and max(seq_lens) <= 512
            aligned = check_balance(shares, tiles, most_parts, heads * max_query_len, many_short)
            first_completes = not aligned and most_parts <= (0 if many_short else 4)
            assert not most_parts or all(share[7] >> 1 & 1 == first_completes for share in shares)
            assert helpers == (len(shares) - sum(share[2] > 0 for share in shares) if most_parts and aligned else 0)


def test_a_batch_invariant_share_is_a_run_of_requests_of_its_size() -> None:
    shares, splits = plan([640] * 264, 128, 1, True)
    assert [share[2] for share in shares] == [40] * 66
    assert splits == [0] * 265


@pytest.mark.parametrize(("heads", "least_split"), [(16, 3), (128, 6)])
def test_short_requests_stay_whole(heads: int, least_split: int) -> None:
    """More workers for each request would save less than it takes to combine what they find."""
    for tiles in range(1, 2 * least_split):
        shares, splits = plan([tiles * TILE_TOKENS] * 33, heads, 1, False)
        assert (splits[-1] > 0) == (tiles >= least_split)
        assert sum(share[2] for share in shares) == 33 * tiles


@pytest.mark.parametrize(
    ("heads", "seq_lens", "workers", "helpers"),
    [
        (16, [4096], 64, 68),
        (16, [300], 5, 127),
        (16, [4096] * 8, 128, 4),
        (64, [100], 1, 0),
        (128, [100], 1, 0),
        (128, [300], 5, 61),
        (128, [4096], 32, 34),
        (128, [4096] * 8, 64, 2),
    ],
)
def test_who_gets_tiles_and_who_helps(heads: int, seq_lens: list[int], workers: int, helpers: int) -> None:
    """Up to half of the workers may have a single tile, and those that would not shorten the longest share help."""
    if torch.cuda.get_device_properties(0).multi_processor_count != 132:
        pytest.skip("the numbers are those of 132 multiprocessors")
    shares, _ = plan(seq_lens, heads, 1, False)
    assert sum(share[2] > 0 for share in shares) == workers
    assert sum(share[2] == 0 and share[5] > 0 for share in shares) == helpers


@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("length", [200, 2000, 20_000])
def test_requests_without_tokens_change_nothing(heads: int, length: int) -> None:
    """A CUDA graph pads a batch with them, and its results are those of the batch alone."""
    for requests in (1, 5, 40):
        alone, padded = plan([length] * requests, heads, 1, False), plan([length] * requests + [0] * 3, heads, 1, False)
        assert padded[0] == alone[0]
        assert padded[1] == alone[1] + alone[1][-1:] * 3
