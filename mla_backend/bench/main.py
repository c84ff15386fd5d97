"""The command `mla-bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from mla_backend import has_compiled_kernels
from mla_backend.bench.contenders import CONTENDERS, OURS
from mla_backend.bench.measure import Row, Stopwatch, ceilings, measure
from mla_backend.bench.report import best_peer_over_ours, cliffs, draw, table, write_json
from mla_backend.bench.shapes import DEFAULT, LINES, QUANTIZED, anywhere

SLOWER, CLIFF = 1.05, 1.3  # times the best peer, and times the line through the neighbours: what a sweep tells of


def find_cliffs(machine: dict[str, float], stopwatch: Stopwatch, repeats: int) -> None:
    """Measure our kernel along LINES, and print where its time jumps."""
    for name, line in LINES.items():
        rows = [measure(shape, [OURS], machine, stopwatch, repeats) for _, shape in tqdm(line, unit="shape", desc=name)]
        timings = [row.timings[OURS] for row in rows]
        for row, timing in zip(rows, timings, strict=True):
            if timing.failure:
                print(f"{OURS}, {row.shape}: {timing.failure}")
        points = [(float(x), t.median) for (x, _), t in zip(line, timings, strict=True) if t.median]
        for x, factor in cliffs(points, CLIFF):
            print(f"a cliff along {name}: at {x:.0f} it takes {factor:.2f} times what its neighbours suggest")


def print_slower(rows: list[Row]) -> None:
    """Print on which of the rows our kernel is slower than the best peer."""
    factors = [(1 / ratio, row.shape) for row in rows if (ratio := best_peer_over_ours(row))]
    slower = sorted(((factor, shape) for factor, shape in factors if factor > SLOWER), reverse=True)
    print(f"slower than {SLOWER} times the best peer: {len(slower)} of {len(factors)} shapes")
    for factor, shape in slower:
        print(f"{factor:5.2f}  {shape}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="mla-bench", description="Measure MLA decode kernels side by side.")
    parser.add_argument("--out", type=Path, help="folder for mla-bench.json and mla-bench.png (default: neither)")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help="contenders")
    parser.add_argument("--repeats", type=int, default=21, help="replays per contender and shape (default: 21)")
    parser.add_argument(
        "--sweep", type=int, metavar="N", help="measure N random shapes instead, and look for cliffs between others"
    )
    parser.add_argument("--quantized", action="store_true", help="measure over caches of float8 numbers instead")
    options = parser.parse_args()
    if options.sweep is not None and options.sweep < 1:
        raise SystemExit(
            f"mla-bench: --sweep {options.sweep} measures nothing; give it the number of shapes, such as 200."
        )
    if options.sweep and OURS not in options.only:
        raise SystemExit(f"mla-bench: --sweep judges {OURS}, which --only leaves out; name it there too.")
    if options.sweep and options.quantized:
        raise SystemExit("mla-bench: --sweep measures caches of bfloat16 numbers; leave one of it and --quantized out.")
    if not torch.cuda.is_available():
        raise SystemExit("mla-bench: no GPU was found, and there is nothing to measure without one.")
    if OURS in options.only and not has_compiled_kernels():
        raise SystemExit("mla-bench: the compiled kernels are not installed; reinstall with MLA_BACKEND_CUDA=1.")

    stopwatch = Stopwatch()
    machine = ceilings(stopwatch)
    read, product, launch = machine.values()
    print(
        f"{torch.cuda.get_device_name()}: reads {read / 1e12:.2f} TB/s, multiplies {product / 1e12:.0f} TFLOP/s, "
        f"a tiny kernel takes {launch:.1f} us"
    )
    shapes = anywhere(options.sweep) if options.sweep else QUANTIZED if options.quantized else DEFAULT
    bar = tqdm(shapes, unit="shape")
    rows = [measure(shape, options.only, machine, stopwatch, options.repeats) for shape in bar]
    print("medians in microseconds")
    print(table(rows))
    for name in options.only:
        failures = {row.timings[name].failure for row in rows} - {""}
        for failure in sorted(failures):
            print(f"{name}: {failure}")
    if options.sweep:
        print_slower(rows)
        find_cliffs(machine, stopwatch, options.repeats)
    if options.out:
        of_cache = "float8" if options.quantized else "bf16"
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "mla-bench.json", rows, machine, of_cache)
        if not options.sweep:  # too many shapes for one axis
            draw(options.out / "mla-bench.png", rows, of_cache)


if __name__ == "__main__":
    main()
