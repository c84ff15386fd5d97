"""NVIDIA's compute-sanitizer finds nothing wrong with the kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mla_backend.operators import has_compiled_kernels

SANITIZER = shutil.which("compute-sanitizer")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_compiled_kernels() and SANITIZER),
    reason="needs a Hopper GPU, the compiled kernels and compute-sanitizer",
)


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All tools at once: each spends most of its time on starting torch."""
    folder = Path(__file__).parent
    # Only our kernels; but whether what they read was ever written, other kernels have a say in.
    ours = {tool: [] if tool == "initcheck" else ["--kernel-name", "kns=mla_backend"] for tool in TOOLS}
    script = str(folder / "small_steps.py")
    path = os.pathsep.join([str(folder.parent.parent), str(folder), os.environ.get("PYTHONPATH", "")])
    started = {
        tool: subprocess.Popen(
            [str(SANITIZER), "--tool", tool, "--error-exitcode", "1", *ours[tool], sys.executable, script],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for tool in TOOLS
    }
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("tool", TOOLS)
def test_finds_nothing(tool: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = processes[tool].communicate(timeout=300)
    assert processes[tool].returncode == 0, output[-4000:]
    assert "SUMMARY: 0 " in output, output[-4000:]
