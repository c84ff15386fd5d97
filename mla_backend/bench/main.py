"""The command `mla-bench`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from mla_backend import has_compiled_kernels
from mla_backend.bench.contenders import CONTENDERS, OURS
from mla_backend.bench.measure import Stopwatch, ceilings, measure
from mla_backend.bench.report import draw, table, write_json
from mla_backend.bench.shapes import DEFAULT


def main() -> None:
    parser = argparse.ArgumentParser(prog="mla-bench", description="Measure MLA decode kernels side by side.")
    parser.add_argument("--out", type=Path, help="folder for mla-bench.json and mla-bench.png (default: neither)")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help="contenders")
    parser.add_argument("--repeats", type=int, default=21, help="replays per contender and shape (default: 21)")
    options = parser.parse_args()
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
    bar = tqdm(DEFAULT, unit="shape")
    rows = [measure(shape, options.only, machine, stopwatch, options.repeats) for shape in bar]
    print("medians in microseconds")
    print(table(rows))
    for name in options.only:
        failures = {row.timings[name].failure for row in rows} - {""}
        for failure in sorted(failures):
            print(f"{name}: {failure}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "mla-bench.json", rows, machine)
        draw(options.out / "mla-bench.png", rows)


if __name__ == "__main__":
    main()
