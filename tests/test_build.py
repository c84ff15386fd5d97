"""What setup.py does where CUDA's compiler is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mla_backend.operators import LIBRARY

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


@pytest.mark.skipif(not LIBRARY.exists(), reason="needs the compiled kernels")
def test_kernels_know_where_their_code_lies(tmp_path: Path) -> None:
    """The library that is installed has been through csrc/locate.py, which finds nothing to do there a second time."""
    library = tmp_path / "library.so"
    library.write_bytes(LIBRARY.read_bytes())
    done = subprocess.run([sys.executable, "csrc/locate.py", library], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "decode_" in done.stderr
    assert "reads the counters %pm0_64 and %pm1_64 in 0 places" in done.stderr


def test_a_file_without_kernels_is_refused(tmp_path: Path) -> None:
    nothing = tmp_path / "launch.o"
    nothing.write_bytes(b"\x7fELF" + bytes(100))
    done = subprocess.run([sys.executable, "csrc/locate.py", nothing], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no decode kernel was found" in done.stderr
