"""What mla-bench makes of its times. The times themselves take a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from mla_backend.bench.contenders import OURS
from mla_backend.bench.engine import covered
from mla_backend.bench.main import print_slower
from mla_backend.bench.measure import Row, Timing
from mla_backend.bench.report import cliffs, interpolated, one_layer, table
from mla_backend.bench.shapes import DEFAULT, LINES, MOST_TOKENS, anywhere, uniform


def test_a_floor_is_what_bytes_or_flops_take() -> None:
    shape = uniform(16, 1, 8, 4096)
    assert shape.bytes == 2 * (8 * 4096 * 576 + 8 * 16 * (576 + 512))
    assert shape.flops == 2 * 8 * 4096 * 16 * (576 + 512)
    assert shape.floor(shape.bytes, shape.flops / 2) == 2.0
    assert shape.floor(shape.bytes / 3, shape.flops) == 3.0


def test_a_quantised_cache_has_half_of_the_bytes() -> None:
    shape, quantized = uniform(16, 1, 8, 4096), replace(uniform(16, 1, 8, 4096), quantized=True)
    assert shape.bytes - quantized.bytes == 8 * 4096 * 576
    assert shape.flops == quantized.flops


def test_the_table_has_a_dash_where_no_peer_ran() -> None:
    ours = Timing(10, 9, 11)
    alone = Row("alone", 16, 16, 5, {OURS: ours, "a peer": Timing(failure="not installed")})
    beside = Row("beside", 16, 16, 5, {OURS: ours, "a peer": Timing(20, 19, 21)})
    lines = table([alone, beside]).splitlines()
    assert [line.split()[1:] for line in lines[1:3]] == [["5.0", "10.0", "-", "-"], ["5.0", "10.0", "20.0", "2.00"]]
    assert lines[3:] == ["geometric mean of best peer / ours: 2.000"]
    assert len(table([alone]).splitlines()) == 2


def test_time_in_which_kernels_overlap_counts_once() -> None:
    assert covered([(5, 6), (0, 2), (1, 3)]) == 4
    assert covered([(0, 10), (2, 3), (10, 11)]) == 11
    assert covered([]) == 0


def test_a_typical_layer_is_found_in_a_trace() -> None:
    def kernel(name: str, begin: float, takes: float) -> dict[str, Any]:
        return {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": takes}

    begins = [100, 111, 120, 130, 170]  # the fourth layer ends a step
    events = [kernel("ours::plan", 90, 2), {"ph": "M", "name": "a remark"}]
    for begin in begins:
        events += [
            kernel("ours::other", begin + 1, 4),
            kernel("ours::decode", begin, 3),
            kernel("gemm", begin + 6, 2),
        ]
    events.append({"ph": "X", "cat": "cuda_runtime", "name": "cudaEventSynchronize", "ts": 0, "dur": 500})
    found, begin, end = one_layer(events, "ours::")
    assert (begin, end) == (100, 111)
    assert [e["name"] for e in found] == ["cudaEventSynchronize", "ours::decode", "ours::other", "gemm"]
    with pytest.raises(ValueError, match="no two kernels of the trace are called theirs"):
        one_layer(events, "theirs")


def test_random_shapes() -> None:
    shapes = anywhere(200)
    assert shapes == anywhere(200) != anywhere(200, seed=1)
    assert {shape.heads for shape in shapes} == set(range(8, 129, 8))
    requests, lengths = ([len(s.seq_lens) for s in shapes], [s.seq_lens[0] for s in shapes])
    assert min(requests) == 1
    assert 200 < max(requests) <= 256
    assert 100 <= min(lengths) < 200
    assert 80_000 < max(lengths) <= 100_000
    assert all(sum(shape.seq_lens) <= MOST_TOKENS for shape in shapes)
    assert sum(length < 3163 for length in lengths) == pytest.approx(100, abs=30)  # the middle of the logarithms


def test_lines_grow() -> None:
    for line in LINES.values():
        assert all(a < b for (a, _), (b, _) in pairwise(line))
        assert len({shape.name for _, shape in line}) == len(line)


def test_names_are_unique() -> None:
    assert len({shape.name for shape in DEFAULT}) == len(DEFAULT)


def test_interpolation_is_exact_for_powers() -> None:
    assert interpolated(6, (2, 2**1.5), (11, 11**1.5)) == pytest.approx(6**1.5)


def test_cliffs() -> None:
    smooth = [(float(n), 10 + 3.0 * n) for n in (1, 2, 4, 8, 16, 32)]
    assert cliffs(smooth, 1.3) == []
    jump = [*smooth[:3], (8.0, 2 * smooth[3][1]), *smooth[4:]]
    assert [x for x, factor in cliffs(jump, 1.3) if factor > 1.8] == [8.0]


def test_only_rows_on_which_a_peer_is_faster_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    times = {
        "ahead": (10, 20),
        "a little behind": (10, 9.8),
        "behind": (30, 20),
        "far behind": (40, 10),
        "failed": (0, 5),
    }
    print_slower([Row(n, 16, 16, 1, {OURS: Timing(ours), "peer": Timing(peer)}) for n, (ours, peer) in times.items()])
    told = capsys.readouterr().out.splitlines()
    assert told == ["slower than 1.05 times the best peer: 2 of 4 shapes", " 4.00  far behind", " 1.50  behind"]


WRONG = {"--sweep 0": "such as 200", "--sweep 5 --only FlashMLA": "name it there too", "": "no GPU was found"}
WRONG["--sweep 5 --quantized"] = "leave one of it and --quantized out"


@pytest.mark.parametrize("arguments", WRONG)
def test_says_what_is_missing(arguments: str) -> None:
    command = [sys.executable, "-m", "mla_backend.bench.main", *arguments.split()]
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # not what vLLM adds to ours
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 1
    assert run.stderr.startswith("mla-bench: ")
    assert WRONG[arguments] in run.stderr
    assert run.stderr.count("\n") == 1
