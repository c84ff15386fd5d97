"""What setup.py does where CUDA's compiler is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup(tmp_path: Path, setting: str) -> subprocess.CompletedProcess[str]:
    """Ask setup.py for the version, with no nvcc to be found."""
    nowhere = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "MLA_BACKEND_CUDA": setting}
    command = [sys.executable, "setup.py", "--quiet", "--version"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **nowhere}, capture_output=True, text=True)


def test_it_installs_without_and_says_so_in_one_line(tmp_path: Path) -> None:
    done = setup(tmp_path, "")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("mla_backend")]
    assert said == [
        "mla_backend: installing without the compiled kernels, because no nvcc of CUDA 12.8 or later was found."
    ]


@pytest.mark.parametrize(("setting", "code"), [("1", 1), ("0", 0)])
def test_the_setting_decides(tmp_path: Path, setting: str, code: int) -> None:
    done = setup(tmp_path, setting)
    assert done.returncode == code
    assert ("MLA_BACKEND_CUDA=1 asks for the compiled kernels, but no nvcc" in done.stderr) == (setting == "1")
    assert "installing without" not in done.stdout
