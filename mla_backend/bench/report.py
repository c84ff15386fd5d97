"""The results as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
from collections import Counter
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mla_backend.bench.contenders import OURS
from mla_backend.bench.measure import Row


def table(rows: list[Row]) -> str:
    names = list(rows[0].timings)
    lines = [f"{'shape':32} {'floor':>7} " + " ".join(f"{name:>16}" for name in names) + f" {'best peer / ours':>17}"]
    ratios = []
    for row in rows:
        cells = [f"{t.median:16.1f}" if t.median else f"{'-':>16}" for t in row.timings.values()]
        ratio = best_peer_over_ours(row)
        ratios += [ratio] if ratio else []
        ahead = f"{ratio:17.2f}" if ratio else f"{'-':>17}"
        lines.append(f"{row.shape:32} {row.floor:7.1f} {' '.join(cells)} {ahead}")
    if ratios:
        lines.append(f"geometric mean of best peer / ours: {math.exp(sum(map(math.log, ratios)) / len(ratios)):.3f}")
    return "\n".join(lines)


def best_peer_over_ours(row: Row) -> float | None:
    peers = [t.median for name, t in row.timings.items() if name != OURS and t.median]
    mine = row.timings.get(OURS)
    return min(peers) / mine.median if peers and mine and mine.median else None


def interpolated(x: float, left: tuple[float, float], right: tuple[float, float]) -> float:
    """Return the value at x of the line through two points (x, y), both axes logarithmic."""
    (x0, y0), (x1, y1) = left, right
    return float(y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0)))


def cliffs(line: list[tuple[float, float]], limit: float) -> list[tuple[float, float]]:
    """Return where a line of points (x, time) jumps: the points more than `limit` times above the line through their
    neighbours, each with the factor by which it is."""
    inner = zip(line, line[1:], line[2:], strict=False)
    factors = [(x, time / interpolated(x, left, right)) for left, (x, time), right in inner]
    return [(x, factor) for x, factor in factors if factor > limit]


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def about() -> dict[str, object]:
    """Return what the results depend on: the GPU, the versions, and the commit if run in a checkout."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver_and_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("mla-backend", "torch", "vllm", "flashinfer-python", "triton")},
        "commit": commit,
    }


def write_json(path: Path, rows: list[Row], machine: dict[str, float], of_cache: str) -> None:
    result = {"about": {**about(), "cache": of_cache, "ceilings": machine}, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(result, indent=1) + "\n")


def draw(path: Path, rows: list[Row], of_cache: str) -> None:
    """Time over the floor by shape, one line per contender, one panel per regime."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    regimes = {
        "few rows (up to 64)": [r for r in rows if r.query_rows <= 64],
        "many rows": [r for r in rows if r.query_rows > 64],
    }
    regimes = {name: chosen for name, chosen in regimes.items() if chosen}
    figure, panels = pyplot.subplots(1, len(regimes), figsize=(7 * len(regimes), 5.5), dpi=110, squeeze=False)
    for axes, (regime, chosen) in zip(panels[0], regimes.items(), strict=True):
        ordered = sorted(chosen, key=lambda r: r.floor)
        for name in ordered[0].timings:
            points = [r.timings[name].median / r.floor if r.timings[name].median else math.nan for r in ordered]
            axes.plot(range(len(ordered)), points, "o-", label=name, linewidth=2.5 if name == OURS else 1.2)
        axes.set_xticks(range(len(ordered)), [r.shape for r in ordered], rotation=60, ha="right", fontsize=8)
        axes.set_yscale("log")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_ylabel("time / floor")
        axes.set_title(regime)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(f"MLA decode over a {of_cache} cache on one {torch.cuda.get_device_name()}")
    figure.tight_layout()
    figure.savefig(path)


def one_layer(events: list[dict[str, Any]], attention: str) -> tuple[list[dict[str, Any]], float, float]:
    """Find a typical layer in the events of a Chrome trace, from its attention to the next layer's.

    Args:
        events: of one profile, in any order; times in microseconds.
        attention: what the names of attention kernels match, a regular expression.

    Returns:
        The events in it, and when it begins and ends.

    Raises:
        ValueError: there are no two layers with attention.
    """
    spans = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"])
    names = Counter(e["name"] for e in spans if e.get("cat") == "kernel" and re.search(attention, e["name"]))
    first = names.most_common(1)[0][0] if names else ""  # once for each layer, unlike a plan; the first of equally many
    layers = list(pairwise(e["ts"] for e in spans if e["name"] == first))
    if not layers:
        raise ValueError(f"no two kernels of the trace are called {attention}")
    begin, end = sorted(layers, key=lambda layer: layer[1] - layer[0])[len(layers) // 2]
    return [e for e in spans if e["ts"] < end and e["ts"] + e["dur"] > begin], begin, end


def draw_layer(path: Path, trace: Path, attention: str) -> None:
    """A typical layer of a Chrome trace: kernels by stream, those of `attention` in colour, and what the CPU calls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    events, begin, end = one_layer(json.loads(trace.read_text())["traceEvents"], attention)
    lanes: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        kind = event.get("cat", "")
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            lanes.setdefault(f"stream {event['args']['stream']}", []).append(event)
        elif kind in ("cuda_runtime", "cuda_driver"):
            lanes.setdefault("CPU", []).append(event)
    figure, axes = pyplot.subplots(figsize=(14, 1.6 + 0.7 * len(lanes)), dpi=110)
    colours: dict[str, str] = {}
    for height, (lane, mine) in enumerate(lanes.items()):
        for event in mine:
            colour = "silver" if lane != "CPU" else "whitesmoke"
            if lane != "CPU" and re.search(attention, event["name"]):
                name = re.findall(r"\w+(?=[<(]|$)", event["name"])[0]
                colour = colours.setdefault(name, f"C{len(colours)}")
            begins_before_last = sum(e["ts"] < event["ts"] < e["ts"] + e["dur"] for e in mine)
            low = height + 0.25 * min(begins_before_last, 2)  # kernels that overlap
            axes.broken_barh([(event["ts"] - begin, event["dur"])], (low, 0.5), color=colour, edgecolor="black", lw=0.4)
            if lane == "CPU":
                axes.text(max(1, event["ts"] - begin + 1), height + 0.2, event["name"], fontsize=8)
    axes.set_xlim(-0.02 * (end - begin), end - begin)
    axes.set_yticks([height + 0.3 for height in range(len(lanes))], list(lanes))
    axes.set_xlabel("microseconds")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in colours.items()]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.set_title(f"one layer of a decode step, {trace.stem}")
    figure.tight_layout()
    figure.savefig(path)
