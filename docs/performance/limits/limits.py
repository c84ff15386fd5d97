"""How long a kernel takes that only reads as much and multiplies as often as decode steps do.

Compile that kernel, with or without the GPU at hand, then run this where mla_backend and its compiled kernels are:

    nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a -shared -Xcompiler=-fPIC \\
        docs/performance/limits/limits.cu -o limits.so
    python docs/performance/limits/limits.py limits.so --out limits.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mla_backend.bench.contenders import ours
from mla_backend.bench.measure import Stopwatch, capture, ceilings, interleaved, make_step
from mla_backend.bench.report import about
from mla_backend.bench.shapes import DEFAULT, Shape

LONG = 100e-6  # seconds of the floor from which on products are measured, too
MANY_ROWS = 64  # query rows of a request, likewise


def kernel(library: ctypes.CDLL, shape: Shape) -> tuple[Callable[[], object], Callable[..., None]]:
    """Return our kernel's call for a shape, and `limits_work` for its cache."""
    step = make_step(shape)
    pages = step.kv_cache.shape[0]
    order = torch.randperm(pages, device="cuda").to(torch.int32)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count

    def work(
        *,
        tokens: int,
        ring: int,
        scattered: bool,
        evict_first: bool,
        read: int = pages,
        flops: int = 0,
        products: int = 0,
    ) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        tensors = (ctypes.c_void_p(step.kv_cache.data_ptr()), ctypes.c_void_p(order.data_ptr()))
        reading = (read, tokens, ring, int(scattered), int(evict_first))
        error = library.limits_work(*tensors, *reading, ctypes.c_double(flops), products, multiprocessors, stream)
        if error:
            raise RuntimeError(f"limits_work: CUDA error {error}")

    return ours(step), work


def calls(library: ctypes.CDLL, shape: Shape) -> dict[str, Callable[[], object]]:
    """Return what is to be timed for a shape, by name."""
    decode, work = kernel(library, shape)
    timed: dict[str, Callable[[], object]] = {"ours": decode}
    for evict_first in (False, True):
        policy = ", evict first" if evict_first else ""
        for tokens in (16, 64):
            name = f"pages in order, {tokens} tokens at a time{policy}"
            timed[name] = partial(work, tokens=tokens, ring=3, scattered=False, evict_first=evict_first)
        for ring in (2, 3):
            name = f"scattered pages, {ring} on their way{policy}"
            timed[name] = partial(work, tokens=64, ring=ring, scattered=True, evict_first=evict_first)
    if shape.heads * shape.queries >= MANY_ROWS and shape.floor(4.4e12, 800e12) > LONG:
        for products, kind in enumerate(("wide", "mixture", "mixture with exponentials")):
            multiply = {"ring": 2, "scattered": True, "evict_first": False, "flops": shape.flops, "products": products}
            timed[f"products, {kind}"] = partial(work, tokens=64, read=200, **multiply)
            timed[f"pages and products, {kind}"] = partial(work, tokens=64, **multiply)
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="limits.cu, compiled")
    parser.add_argument("--out", type=Path, help="JSON file for the results (default: none)")
    parser.add_argument("--repeats", type=int, default=15, help="replays of each (default: 15)")
    options = parser.parse_args()
    library = ctypes.CDLL(str(options.library.resolve()))
    stopwatch = Stopwatch()
    machine = ceilings(stopwatch)
    print(machine)
    rows = []
    for shape in DEFAULT:
        timed = calls(library, shape)
        graphs = {name: capture(call) for name, call in timed.items()}
        times = interleaved(graphs, stopwatch, options.repeats)
        medians = {name: statistics.median(values) for name, values in times.items()}
        floor = shape.floor(machine["read_bytes_per_second"], machine["bf16_flops_per_second"]) * 1e6
        rows.append({"shape": shape.name, "floor": floor, "flops": shape.flops, "medians": medians})
        print(f"{shape.name:26} floor {floor:6.1f}", end="")
        for kind in ("ours", "pages in order", "scattered pages", "products", "pages and products"):
            if found := [time for name, time in medians.items() if name.split(",")[0] == kind]:
                print(f"   {kind} {min(found):6.1f} ({shape.flops / min(found) / 1e6:.0f})", end="")
        print(flush=True)
    if options.out:
        options.out.write_text(json.dumps({"about": {**about(), "ceilings": machine}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
