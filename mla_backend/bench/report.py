"""The results as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
        lines.append(f"{row.shape:32} {row.floor:7.1f} {' '.join(cells)} {ratio or math.nan:17.2f}")
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


def write_json(path: Path, rows: list[Row], machine: dict[str, float]) -> None:
    result = {"about": {**about(), "ceilings": machine}, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(result, indent=1) + "\n")


def draw(path: Path, rows: list[Row]) -> None:
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
    figure.suptitle(f"MLA decode in bf16 on one {torch.cuda.get_device_name()}")
    figure.tight_layout()
    figure.savefig(path)
