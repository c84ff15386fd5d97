"""The compiled kernel against the reference, over everything that the contract of `mla_decode` allows it."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mla_backend import DecodeSchedule, mla_decode
from mla_backend.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from mla_backend.operators import has_compiled_kernels
from mla_backend.reference import mla_decode_reference

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_compiled_kernels()), reason="needs a Hopper GPU and the compiled kernels"
)

RANDOM_CASES = 2000
PAGE_SIZES = (16, 32, 64, 128, 192)


@dataclass
class Step:
    """A decode step on the GPU, with NaN in the cache and garbage in the block table wherever it must not look."""

    seq_lens: list[int]
    query_lens: list[int]
    heads: int
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    deviation: float = 0.1
    padding_rows: int = 0
    page_padding: int = 0
    token_padding: int = 0
    query_padding: int = 0
    batch_invariant: bool = False
    quantized: bool = False
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator("cuda").manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", generator=generator, dtype=torch.float32) * self.deviation

        pages_of = [-(-length // self.page_size) for length in self.seq_lens]
        total = sum(pages_of) + 2
        width = 576 + self.token_padding
        storage = normal(total, self.page_size * width + self.page_padding)
        cache = storage[:, : self.page_size * width].unflatten(1, (self.page_size, width))[..., :576]
        numbers = torch.randperm(total, device="cuda", generator=generator, dtype=torch.int32)
        table = torch.full((len(pages_of), max(pages_of, default=0) + 3), 2**31 - 1, dtype=torch.int32, device="cuda")
        first = 0
        for request, (count, length) in enumerate(zip(pages_of, self.seq_lens, strict=True)):
            table[request, :count] = numbers[first : first + count]
            first += count
            if length % self.page_size:
                cache[table[request, count - 1], length % self.page_size :] = torch.nan
        cache[numbers[first:].long()] = torch.nan
        scale = torch.tensor(self.deviation / 50, device="cuda") if self.quantized else None  # they stay below 448
        storage = storage.to(self.dtype) if scale is None else (storage / scale).to(torch.float8_e4m3fn)
        cache = storage[:, : self.page_size * width].unflatten(1, (self.page_size, width))[..., :576]

        tokens = sum(self.query_lens) + self.padding_rows
        query = normal(tokens, self.heads, 576 + self.query_padding).to(self.dtype)
        starts = list(itertools.accumulate(self.query_lens, initial=0))
        seq_lens = torch.tensor(self.seq_lens, dtype=torch.int32, device="cuda")
        return {
            "q_nope": query[..., self.query_padding : self.query_padding + 512],
            "q_pe": query[..., self.query_padding + 512 :],
            "kv_cache": cache,
            "block_table": table,
            "seq_lens": seq_lens,
            "query_start_loc": torch.tensor(starts, dtype=torch.int32, device="cuda"),
            "softmax_scale": 192**-0.5,
            "causal": self.causal,
            "kv_scale": scale,
            "schedule": DecodeSchedule.plan(
                seq_lens,
                heads=self.heads,
                max_query_len=max(self.query_lens, default=0),
                max_seq_len=max(self.seq_lens, default=0),
                batch_invariant=self.batch_invariant,
                quantized=self.quantized,
            ),
        }


def reference(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = dict(arguments)
    schedule = arguments.pop("schedule")
    out = torch.empty(arguments["q_nope"].shape, device="cuda")
    lse = torch.empty(out.shape[:2], device="cuda")
    bounds = {"max_query_len": schedule.max_query_len, "max_seq_len": schedule.max_seq_len}
    mla_decode_reference(**arguments, **bounds, out=out, lse=lse)
    return out, lse


def check(step: Step) -> None:
    arguments = step.arguments()
    expected, expected_lse = reference(arguments)
    wide = torch.full((*expected.shape[:2], 512 + step.query_padding), torch.nan, dtype=step.dtype, device="cuda")
    poison = torch.full_like(arguments["schedule"].buffers.partial_out, torch.nan)
    arguments["schedule"].buffers.partial_out.copy_(poison)
    out, lse = mla_decode(**arguments, out=wide[..., :512], return_lse=True)
    assert out.isfinite().all(), step
    assert not arguments["schedule"].buffers.arrivals.any(), step
    out = out.float()
    if step.deviation <= 0.1:
        excess = (out - expected).abs() - 8e-4 - expected.abs() / 64
        assert expected.numel() == 0 or excess.max() <= 0, f"{step}: {excess.max():.1e} over the tolerance"
        norms = (out.double().square().sum() + expected.double().square().sum()).clamp(min=1e-12)
        cosine_difference = 1 - 2 * (out.double() * expected).sum() / norms
        assert expected.abs().sum() == 0 or cosine_difference < 5e-6, f"{step}: cosine difference {cosine_difference}"
    else:
        error = (out - expected).norm() / expected.norm().clamp(min=1e-20)
        assert error < 0.01, f"{step}: relative error {error:.1e}"
    torch.testing.assert_close(lse, expected_lse, rtol=1.3e-4, atol=1e-6 * max(1, (step.deviation / 0.1) ** 2))
    if step.query_padding:
        assert wide[..., 512:].isnan().all(), step


def random_step(seed: int) -> Step:
    rng = random.Random(seed)
    requests = rng.choice([1, 1, 2, 3, 5, 8, 33, 140])
    longest_query = rng.choice([1, 1, 1, 2, 4, 5, 17])
    uniform = rng.random() < 0.6
    query_lens = [longest_query if uniform else rng.randint(0, longest_query) for _ in range(requests)]
    longest = rng.choice([1, 20, 64, 65, 300, 1500, 6000 if requests < 10 else 700])
    seq_lens = [
        0 if rng.random() < 0.08 else longest if rng.random() < 0.2 else rng.randint(1, longest) for _ in query_lens
    ]
    step = Step(
        seq_lens=seq_lens,
        query_lens=query_lens,
        heads=rng.choice([1, 2, 3, 7, 8, 16, 16, 20, 32, 63, 64, 65, 126, 128, rng.randint(1, 128)]),
        page_size=rng.choice(PAGE_SIZES),
        dtype=rng.choice([torch.bfloat16, torch.float16]),
        causal=rng.random() < 0.7,
        deviation=rng.choice([0.1, 0.1, 1.0, 5.0]),
        padding_rows=rng.choice([0, 0, 3]),
        page_padding=rng.choice([0, 64, 8]),
        token_padding=rng.choice([0, 0, 8, 576]),
        query_padding=rng.choice([0, 0, 8, 1]),
        seed=seed,
    )
    if rng.random() < 0.4:
        paddings = {"page_padding": 2 * step.page_padding, "token_padding": 2 * step.token_padding}  # to 16 bytes
        step = replace(step, quantized=True, **paddings)
    return step


@pytest.mark.parametrize("part", range(10))
def test_random_steps(part: int) -> None:
    for seed in range(part * RANDOM_CASES // 10, (part + 1) * RANDOM_CASES // 10):
        check(random_step(seed))


both_caches = pytest.mark.parametrize("quantized", [False, True], ids=["", "quantized"])


@both_caches
@pytest.mark.parametrize("length", [20, 140, 4096])
@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize("requests", [1, 2, 6, 64])
def test_grid(requests: int, queries: int, length: int, quantized: bool) -> None:
    rng = random.Random(requests * queries * length)
    mixed = [0 if rng.random() < 0.1 else rng.randint(1, length) for _ in range(requests)]
    for heads, lengths, causal in itertools.product(
        (1, 3, 9, 63, 64, 126, 128), ([length] * requests, mixed), (True, False)
    ):
        check(Step(lengths, [queries] * requests, heads, causal=causal, quantized=quantized, seed=heads))


@pytest.mark.parametrize("deviation", [0.1, 5.0])
@pytest.mark.parametrize(("heads", "queries"), [(33, 1), (40, 1), (48, 1), (16, 3), (49, 1), (64, 1), (16, 4)])
def test_many_short_requests(heads: int, queries: int, deviation: float) -> None:
    lengths = [37 * i % 513 for i in range(100)]
    for query_padding in (0, 1):
        check(Step(lengths, [queries] * 100, heads, deviation=deviation, query_padding=query_padding))
        check(Step([512] + [0] * 70, [queries] * 71, heads, deviation=deviation, query_padding=query_padding))  # split


@both_caches
def test_results_are_the_same_from_run_to_run(quantized: bool) -> None:
    arguments = Step([3000, 10, 777, 0, 5000], [2, 1, 3, 1, 1], 48, deviation=1.0, quantized=quantized).arguments()
    first = mla_decode(**arguments, return_lse=True)
    for _ in range(10):
        again = mla_decode(**arguments, return_lse=True)
        assert first[0].equal(again[0])
        assert first[1].equal(again[1])


def uneven(seed: int, heads: int, queries: int, quantized: bool = False) -> dict[str, Any]:
    """A step whose requests, most of two or three parts, are completed by the workers with the first ones."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 3000) for _ in range(150)]
    arguments = Step(lengths, [queries] * 150, heads, deviation=1.0, quantized=quantized, seed=seed).arguments()
    schedule = arguments["schedule"]
    assert schedule.shares[0, 7] >> 1 & 1 == 1 or (quantized and 32 < heads * queries <= 64)
    assert schedule.splits[-1] > 0
    return arguments


def check_again_and_again(arguments: dict[str, Any]) -> None:
    """Parts come in another order every time, and nothing may be read before it is there."""
    buffers, (expected, expected_lse) = arguments["schedule"].buffers, reference(arguments)
    first, first_lse = mla_decode(**arguments, return_lse=True)
    assert (first.float() - expected).norm() < 0.01 * expected.norm()
    torch.testing.assert_close(first_lse, expected_lse, rtol=1.3e-4, atol=1e-4)
    for _ in range(20):
        buffers.partial_out.fill_(torch.nan), buffers.partial_lse.fill_(torch.nan)
        out, lse = mla_decode(**arguments, out=torch.full_like(first, torch.nan), return_lse=True)
        assert out.equal(first)
        assert lse.equal(first_lse)
        assert not buffers.arrivals.any()


@both_caches
@pytest.mark.parametrize(("heads", "queries"), [(8, 1), (16, 1), (16, 2), (40, 1), (16, 4), (128, 1), (128, 3)])
def test_uneven_requests_are_completed_by_their_first_workers(heads: int, queries: int, quantized: bool) -> None:
    """Except with 33 to 64 rows over a quantised cache."""
    check_again_and_again(uneven(heads, heads, queries, quantized))


HELPED = ([1500] * 3, [700] * 2)  # by workers that have no tiles
TWO_OF_A_WORKER = [30000] + [64] * 150 + [30000] * 2
MANY_PARTS = ([9000], [4096] * 8, [2000] * 33, [4641, 45118, 1730, 1696], [70, 30000, 1, 0, 64])
for_many_parts = pytest.mark.parametrize(
    "seq_lens", [*MANY_PARTS, *HELPED, TWO_OF_A_WORKER], ids=lambda lengths: str(lengths[:4])
)


@both_caches
@for_many_parts
@pytest.mark.parametrize(("heads", "queries"), [(8, 1), (16, 1), (16, 2), (64, 1), (128, 1)])
def test_parts_of_many_workers(heads: int, queries: int, seq_lens: list[int], quantized: bool) -> None:
    """All workers of a request combine what they have found."""
    arguments = Step(seq_lens, [queries] * len(seq_lens), heads, deviation=1.0, quantized=quantized).arguments()
    shares = arguments["schedule"].shares
    parts_of_first, parts_of_last, helpers = shares[:, 5] >> 16, shares[:, 6] & 0xFFFF, shares[:, 6] >> 16
    assert seq_lens not in HELPED or helpers.any()
    assert seq_lens != TWO_OF_A_WORKER or ((parts_of_first > 0) & (parts_of_last > 0)).any()
    assert not (shares[:, 7] >> 1 & 1).any()
    check_again_and_again(arguments)


@pytest.mark.parametrize("seq_lens", [[150], [4096] * 8, [4641, 45118, 1730, 1696], [8192] * 64], ids=str)
@both_caches
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_a_call_is_one_launch(heads: int, seq_lens: list[int], quantized: bool) -> None:
    """Of a CUDA graph, whose capture allows nobody to wait for the GPU."""
    arguments = Step(seq_lens, [1] * len(seq_lens), heads, quantized=quantized).arguments()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_decode(**arguments, return_lse=True)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    launched = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    assert len(launched) == 1
    assert "mla_backend::sm90::decode_" in launched[0]


@both_caches
@pytest.mark.parametrize("magnitude", [2.0**-60, 2.0**-20, 2.0**-14, 1, 2.0**16, 2.0**60])
@pytest.mark.parametrize("seq_lens", [[9000], [2000] * 33, [37 * i % 3001 for i in range(1, 150)]], ids=len)
@pytest.mark.parametrize("heads", [16, 40, 64, 128])
def test_parts_keep_their_precision(heads: int, seq_lens: list[int], magnitude: float, quantized: bool) -> None:
    """Whatever the size of values, and beside columns whose values are 2^12 times larger, 2^8 over a float8 cache."""
    arguments = Step(seq_lens, [1] * len(seq_lens), heads, deviation=1.0, quantized=quantized).arguments()
    assert arguments["schedule"].splits[-1] > 0
    factors, largest = torch.full((512,), magnitude, device="cuda"), magnitude * (2**8 if quantized else 2**12)
    factors[::100] = largest
    values = arguments["kv_cache"][..., :512]
    if quantized:  # float8 has no larger numbers, but all may be
        values.copy_(values.float() * (factors / largest))
        arguments["kv_scale"] *= largest
        arguments["q_pe"] /= largest
    else:
        values *= factors
    arguments["q_nope"] /= factors
    expected, _ = reference(arguments)
    error = (mla_decode(**arguments).float() - expected) / factors
    assert (error.norm(dim=(0, 1)) < 0.01 * (expected / factors).norm(dim=(0, 1))).all()


@both_caches
@for_many_parts
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_workers_that_start_late(heads: int, seq_lens: list[int], quantized: bool) -> None:
    """Other kernels hold the multiprocessors, so workers are done before those with the first parts have started."""
    arguments = Step(seq_lens, [1] * len(seq_lens), heads, deviation=1.0, quantized=quantized).arguments()
    expected = mla_decode(**arguments)
    square = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    other = torch.cuda.Stream()
    for _ in range(30):
        with torch.cuda.stream(other):
            square @ square
        assert mla_decode(**arguments).equal(expected)
    torch.cuda.synchronize()
    assert not arguments["schedule"].buffers.arrivals.any()


def test_steps_at_the_same_time_wait_for_nobody_for_ever() -> None:
    """None fits beside another, and in all of them workers wait for workers."""
    steps = [uneven(seed, heads, 1) for seed, heads in enumerate((16, 128, 16, 128))]
    steps += [uneven(seed, heads, 1, quantized=True) for seed, heads in enumerate((16, 32, 64, 128))]
    equal = [(16, 2, 30000), (16, 33, 2000), *((heads, 3, 1500) for heads in (16, 64, 128))]
    steps += [Step([length] * requests, [1] * requests, heads).arguments() for heads, requests, length in equal]
    streams = [torch.cuda.Stream() for _ in steps]
    expected = [mla_decode(**step) for step in steps]
    outputs = [torch.empty_like(out) for out in expected]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, step, out in zip(streams, steps, outputs, strict=True):
            with torch.cuda.stream(stream):
                mla_decode(**step, out=out)
    torch.cuda.synchronize()
    for out, wanted in zip(outputs, expected, strict=True):
        assert out.equal(wanted)


@both_caches
@pytest.mark.parametrize("heads", [8, 20, 48, 64, 128])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_what_lies_past_a_request_changes_no_bit(heads: int, batch_invariant: bool, quantized: bool) -> None:
    """Not even the last one: a difference of rounding would be one between batches."""
    lengths, queries = [3001, 10, 777, 0, 4999], [2, 1, 3, 1, 1]
    step = Step(
        lengths, queries, heads, deviation=1.0, batch_invariant=batch_invariant, quantized=quantized
    ).arguments()
    first = mla_decode(**step, return_lse=True)
    cache = step["kv_cache"]
    beyond = cache.float().isnan()
    for value in (-300.0, 0.7, 448.0):
        number = torch.tensor(value, dtype=cache.dtype, device="cuda")
        bits = torch.uint8 if quantized else torch.int16  # float8 numbers are not indexed by a mask
        cache.view(bits)[beyond] = number.view(bits)
        again = mla_decode(**step, return_lse=True)
        assert first[0].equal(again[0])
        assert first[1].equal(again[1])


@both_caches
@pytest.mark.parametrize("heads", [8, 16, 20, 128])
def test_batch_invariant_results_do_not_depend_on_the_batch(heads: int, quantized: bool) -> None:
    def attend(step: dict[str, Any], requests: slice, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        lengths, starts = step["seq_lens"][requests], step["query_start_loc"]
        rows = slice(int(starts[:-1][requests][0]), int(starts[1:][requests][-1]))
        bounds = {"heads": heads, "max_query_len": longest, "max_seq_len": 5000}
        plan = DecodeSchedule.plan(lengths, **bounds, batch_invariant=True, quantized=quantized)
        mine = {
            "q_nope": step["q_nope"][rows],
            "q_pe": step["q_pe"][rows],
            "block_table": step["block_table"][requests],
            "seq_lens": lengths,
            "query_start_loc": (starts - rows.start)[requests.start : requests.stop + 1],
            "schedule": plan,
        }
        return mla_decode(**{**step, **mine}, return_lse=True)

    lengths = [3000, 10, 777, 0, 5000, 64]
    step = Step(lengths, [2, 1, 3, 1, 1, 4], heads, deviation=1.0, quantized=quantized).arguments()
    together = attend(step, slice(0, 6), 4)
    expected, _ = reference(step)
    assert (together[0].float() - expected).norm() < 0.01 * expected.norm()
    for request in range(6):
        rows = slice(*step["query_start_loc"][request : request + 2].tolist())
        alone = attend(step, slice(request, request + 1), rows.stop - rows.start)
        assert alone[0].equal(together[0][rows])
        assert alone[1].equal(together[1][rows])


@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_queries_of_any_size_over_a_quantised_cache(heads: int, exponent: int) -> None:
    """They become float16 numbers on the way, whose range is smaller."""
    step = Step([3001, 10, 777], [1, 2, 1], heads, deviation=1.0, quantized=True).arguments()
    expected = mla_decode(**step, return_lse=True)
    scaled = {name: step[name] * 2.0**exponent for name in ("q_nope", "q_pe")}
    out, lse = mla_decode(**{**step, **scaled, "softmax_scale": step["softmax_scale"] / 2.0**exponent}, return_lse=True)
    assert out.equal(expected[0])
    assert lse.equal(expected[1])


@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_queries_of_zeros_over_a_quantised_cache_with_a_small_scale(heads: int) -> None:
    step = Step([3001, 10, 777], [1, 2, 1], heads, quantized=True).arguments()
    nothing = {name: torch.zeros_like(step[name]) for name in ("q_nope", "q_pe")}
    scale = {"kv_scale": torch.tensor(1e-8, device="cuda")}
    out, lse = mla_decode(**{**step, **nothing, **scale}, return_lse=True)
    expected, expected_lse = reference({**step, **nothing, **scale})
    assert (out.float() - expected).norm() < 0.01 * expected.norm()
    torch.testing.assert_close(lse, expected_lse, rtol=1.3e-4, atol=1e-6)


@both_caches
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sink", [0, 64])
@pytest.mark.parametrize("heads", [16, 32, 48, 64, 128])
def test_tokens_beside_a_sink(heads: int, sink: int, dtype: torch.dtype, quantized: bool) -> None:
    """A token with 2^25 times the probability of each other and no value, as attention sinks have."""
    step = Step([1024] * 140, [1] * 140, heads, dtype=dtype, quantized=quantized).arguments()
    cache = torch.zeros(step["kv_cache"].shape, device="cuda")
    cache[..., :512] = 1
    sinks = step["block_table"][:, sink // 64].long()
    cache[sinks, 0, :512] = 0
    cache[sinks, 0, 512] = 240  # times 192^-0.5: 25 log(2)
    step["kv_cache"] = cache.to(step["kv_cache"].dtype)
    step["q_nope"], step["q_pe"] = torch.zeros_like(step["q_nope"]), torch.ones_like(step["q_pe"])
    if quantized:
        step["kv_scale"] = torch.ones((), device="cuda")
    out, _ = mla_decode(**step, return_lse=True)
    expected, _ = reference(step)
    assert (out.float() - expected).norm() < 0.01 * expected.norm()


def test_batch_invariant_with_more_requests_than_multiprocessors() -> None:
    check(Step([(37 * i) % 300 for i in range(300)], [1] * 300, 16, batch_invariant=True))


def test_a_cache_of_more_than_four_gigabytes() -> None:
    pages = 70_000  # of 64 tokens: 5.2 GB
    cache = torch.zeros(pages, 64, 576, dtype=torch.bfloat16, device="cuda")
    cache[-2:] = torch.randn(2, 64, 576, device="cuda")
    arguments = Step([128], [1], 16).arguments()
    arguments["kv_cache"] = cache
    arguments["block_table"] = torch.tensor([[pages - 1, pages - 2]], dtype=torch.int32, device="cuda")
    out, _ = mla_decode(**arguments, return_lse=True)
    expected, _ = reference(arguments)
    torch.testing.assert_close(out.float(), expected, rtol=1 / 64, atol=8e-4)


@both_caches
@pytest.mark.parametrize("heads", [16, 128])
def test_large_pages(heads: int, quantized: bool) -> None:
    """Of 330 boxes or 660, so that finding a box's page is a division by no power of two, up to the last box."""
    check(Step([70_000, 21_120, 21_121], [1, 2, 1], heads, page_size=330 * 64, quantized=quantized))


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_without_requests_all_rows_are_cleared(heads: int) -> None:
    check(Step([], [], heads, padding_rows=3))


def test_rows_before_the_first_request_are_cleared() -> None:
    step = Step([70, 300], [1, 2], 16, padding_rows=4).arguments()
    step["query_start_loc"] += 2
    expected, _ = reference(step)
    out, lse = mla_decode(**step, out=torch.full_like(step["q_nope"], torch.nan), return_lse=True)
    torch.testing.assert_close(out.float(), expected, rtol=1 / 64, atol=8e-4)
    assert (lse[[0, 1, 5, 6]] == -torch.inf).all()


@both_caches
@pytest.mark.parametrize(("heads", "queries"), [(128, 100), (16, 700)])
def test_more_query_rows_than_there_is_room_for_in_partial_results(heads: int, queries: int, quantized: bool) -> None:
    check(Step([queries + 50, 3], [queries, 1], heads, quantized=quantized))


@pytest.mark.parametrize(("queries", "heads"), [(5, 43), (4, 65), (16, 40)])
def test_flash_mla_drop_in_with_rows_that_fill_no_block(queries: int, heads: int) -> None:
    """The plan knows only their product, and so neither how many blocks of rows there are nor how full they are."""
    lengths = torch.tensor([5000, 0, 300], dtype=torch.int32, device="cuda")
    table = torch.randperm(240, device="cuda", dtype=torch.int32).view(3, 80)
    q = torch.randn(3, queries, heads, 576, device="cuda", dtype=torch.bfloat16) * 0.1
    k = torch.randn(240, 64, 1, 576, device="cuda", dtype=torch.bfloat16) * 0.1
    out, _ = flash_mla_with_kvcache(
        q, k, table, lengths, 512, *get_mla_metadata(lengths, queries * heads, 1), causal=True
    )
    exact = (q.float(), k.float(), table, lengths)
    expected = torch.empty(3 * queries, heads, 512, device="cuda")
    starts = torch.arange(4, dtype=torch.int32, device="cuda") * queries
    mla_decode_reference(
        *(exact[0].flatten(0, 1)[..., part] for part in (slice(512), slice(512, 576))),
        *(exact[1][:, :, 0], table, lengths, starts),
        max_query_len=queries,
        max_seq_len=5120,
        softmax_scale=576**-0.5,
        causal=True,
        kv_scale=None,
        out=expected,
        lse=None,
    )
    torch.testing.assert_close(out.flatten(0, 1).float(), expected, rtol=1 / 64, atol=8e-4)


def test_flash_mla_drop_in_with_two_key_heads() -> None:
    lengths = torch.tensor([300, 0, 77], dtype=torch.int32, device="cuda")
    table = torch.randperm(15, device="cuda", dtype=torch.int32).view(3, 5)
    q = torch.randn(3, 2, 32, 576, device="cuda", dtype=torch.bfloat16) * 0.1
    k = torch.randn(15, 64, 2, 576, device="cuda", dtype=torch.bfloat16) * 0.1
    plan = get_mla_metadata(lengths, 32, 2)
    out, lse = flash_mla_with_kvcache(q, k, table, lengths, 512, *plan, causal=True)
    on_cpu = [t.cpu() for t in (q.float(), k.float(), table, lengths)]
    plan = get_mla_metadata(on_cpu[3], 32, 2)
    expected, expected_lse = flash_mla_with_kvcache(*on_cpu, 512, *plan, causal=True)
    torch.testing.assert_close(out.cpu().float(), expected, rtol=1 / 64, atol=8e-4)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1.3e-4, atol=1e-5)
