"""Correctness first, then time: CUDA graph replays after an L2 flush, contenders interleaved, medians."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from mla_backend.bench.contenders import CONTENDERS, MULTIPLIES_FP8, Call, Step
from mla_backend.bench.shapes import Shape
from mla_backend.reference import mla_decode_reference

PAGE_SIZE = 64
TOLERANCE = 0.01  # of the output's norm; bf16 alone makes about 0.003
FP8_TOLERANCE = 0.1  # where queries and probabilities are float8, whose rounding alone makes about 0.03
FLUSH_BYTES = 256 << 20


@dataclass
class Timing:
    """Microseconds of one contender on one shape, or why there are none."""

    median: float = 0.0
    fastest: float = 0.0
    slowest: float = 0.0
    error: float = 0.0  # of the output, relative to its norm
    failure: str = ""


@dataclass
class Row:
    shape: str
    heads: int
    query_rows: int
    floor: float
    timings: dict[str, Timing] = field(default_factory=dict)


def make_step(shape: Shape, seed: int = 0) -> Step:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.empty(*size, device="cuda", dtype=torch.bfloat16).normal_(0, 1, generator=generator)

    requests = len(shape.seq_lens)
    seq_lens = torch.tensor(shape.seq_lens, dtype=torch.int32, device="cuda")
    pages = -(-max(shape.seq_lens) // PAGE_SIZE)
    counts = [-(-length // PAGE_SIZE) for length in shape.seq_lens]
    numbers = torch.randperm(sum(counts), generator=generator, device="cuda", dtype=torch.int32)
    table = torch.zeros(requests, pages, dtype=torch.int32, device="cuda")
    for row, mine in zip(table, numbers.split(counts), strict=True):
        row[: len(mine)] = mine
    tokens = requests * shape.queries
    return Step(
        q_nope=normal(tokens, shape.heads, 512),
        q_pe=normal(tokens, shape.heads, 64),
        kv_cache=normal(sum(counts), PAGE_SIZE, 576).to(torch.float8_e4m3fn if shape.quantized else torch.bfloat16),
        block_table=table,
        seq_lens=seq_lens,
        query_start_loc=torch.arange(0, tokens + 1, shape.queries, dtype=torch.int32, device="cuda"),
        queries=shape.queries,
        max_seq_len=max(shape.seq_lens),
        scale=192**-0.5,
        kv_scale=torch.ones((), device="cuda") if shape.quantized else None,
    )


def reference(step: Step) -> torch.Tensor:
    out = torch.empty(step.q_nope.shape, device="cuda")
    tensors = (step.q_nope, step.q_pe, step.kv_cache, step.block_table, step.seq_lens, step.query_start_loc)
    mla_decode_reference(*tensors, step.queries, step.max_seq_len, step.scale, True, step.kv_scale, out, None)
    return out


def capture(call: Call) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


class Stopwatch:
    """Times graph replays, each with a cold L2 cache."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def microseconds(self, graph: torch.cuda.CUDAGraph) -> float:
        self._flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3


def ceilings(stopwatch: Stopwatch) -> dict[str, float]:
    """Measure what the machine can do: bytes per second read, flops per second in bf16, and one tiny kernel."""
    big = torch.empty(1 << 30, device="cuda").normal_()
    square = torch.empty(8192, 8192, device="cuda", dtype=torch.bfloat16).normal_()
    tiny = torch.zeros(1, device="cuda")
    graphs = [capture(call) for call in (big.sum, lambda: square @ square, lambda: tiny.add_(1))]
    read, product, launch = (statistics.median(stopwatch.microseconds(g) for _ in range(12)) for g in graphs)
    return {
        "read_bytes_per_second": big.nbytes / read * 1e6,
        "bf16_flops_per_second": 2 * 8192**3 / product * 1e6,
        "tiny_kernel_microseconds": launch,
    }


def interleaved(graphs: dict[str, torch.cuda.CUDAGraph], stopwatch: Stopwatch, repeats: int) -> dict[str, list[float]]:
    """Time all graphs in turns, and return microseconds, `repeats` for each name.

    Each time in another order: clocks are lower after a long kernel, so nobody follows it always.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    rng = random.Random(0)
    for _ in range(repeats):
        for name in rng.sample(list(graphs), len(graphs)):
            times[name].append(stopwatch.microseconds(graphs[name]))
    return times


def measure(shape: Shape, names: Iterable[str], machine: dict[str, float], stopwatch: Stopwatch, repeats: int) -> Row:
    """Check every contender against the reference, then time them in turns."""
    step = make_step(shape)
    floor = shape.floor(machine["read_bytes_per_second"], machine["bf16_flops_per_second"]) * 1e6
    row = Row(shape.name, shape.heads, shape.heads * shape.queries, floor)
    expected = reference(step)
    graphs = {}
    calls: list[Call] = []  # they own the memory that the graphs use
    for name in names:
        row.timings[name] = Timing()
        try:
            call = CONTENDERS[name](step)
            error = float((call().float() - expected).norm() / expected.norm())
            if not error < (FP8_TOLERANCE if shape.quantized and name in MULTIPLIES_FP8 else TOLERANCE):
                raise ArithmeticError(f"its output is off by {error:.3f} of the norm")
            row.timings[name].error = error
            graphs[name] = capture(call)
            calls.append(call)
        except Exception as problem:  # a peer that cannot take a shape is a result, and any kind of error may say so
            torch.cuda.synchronize()
            row.timings[name].failure = f"{type(problem).__name__}: {problem}"[:200]
    for name, values in interleaved(graphs, stopwatch, repeats).items():
        timing = row.timings[name]
        timing.median, timing.fastest, timing.slowest = statistics.median(values), min(values), max(values)
    return row
