"""Builds the compiled kernels of csrc/ into one library, where CUDA's compiler is found; installs without it too.

MLA_BACKEND_CUDA=1 makes a missing compiler an error, MLA_BACKEND_CUDA=0 leaves the kernels out.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
NVCC_SINCE = (12, 8)
TARGET = "arch=compute_90a,code=sm_90a"
# The oldest torch whose stable ABI the library may use; it then serves every later one.
TORCH_TARGET = "0x020b000000000000"


def find_nvcc() -> str | None:
    """Return the path of a CUDA compiler that is new enough."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    return nvcc if release and tuple(map(int, release.groups())) >= NVCC_SINCE else None


def find_torch_headers() -> Path | None:
    """Return the headers of the torch that is installed, also from within pip's isolated build environment."""
    for name in ("purelib", "platlib"):
        headers = Path(sysconfig.get_paths()[name]) / "torch" / "include"
        if (headers / "torch" / "csrc" / "stable" / "library.h").exists():
            return headers
    return None


def missing() -> str:
    """Say in words what is missing for a build of the kernels, or nothing."""
    if find_nvcc() is None:
        return f"no nvcc of CUDA {NVCC_SINCE[0]}.{NVCC_SINCE[1]} or later was found"
    if find_torch_headers() is None:
        return "no torch 2.11 or later is installed beside it"
    return ""


def kernels_wanted() -> bool:
    setting = os.environ.get("MLA_BACKEND_CUDA", "")
    if setting == "0":
        return False
    if problem := missing():
        if setting == "1":
            raise SystemExit(f"mla_backend: MLA_BACKEND_CUDA=1 asks for the compiled kernels, but {problem}.")
        print(f"mla_backend: installing without the compiled kernels, because {problem}.")
        return False
    return True


class BuildKernels(build_ext):
    """Compile csrc/ with nvcc and the host's compiler; the library is bound to no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        nvcc, headers = find_nvcc(), find_torch_headers()
        library = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        common = ["-O3", "-c"]
        kernels = [nvcc, "-std=c++17", *common, f"-gencode={TARGET}", "-Xcompiler=-fPIC", "-Xptxas=-v", "-no-compress"]
        kernels += ["--split-compile=0"]  # on all of the processor's cores
        binding = [nvcc, "-std=c++20", *common, "-Xcompiler=-fPIC", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        compilations = (
            [*kernels, str(ROOT / "csrc/launch.cu"), "-o", str(objects / "launch.o")],
            [*binding, f"-I{headers}", str(ROOT / "csrc/bindings.cpp"), "-o", str(objects / "bindings.o")],
        )
        with ThreadPoolExecutor() as pool:  # side by side
            list(pool.map(self.spawn, compilations))
        self.spawn([sys.executable, str(ROOT / "csrc/locate.py"), str(objects / "launch.o")])
        # The library must name torch's libraries as needed, to find their symbols in the process; but the torch here
        # may be a build without CUDA. Empty stand-ins of the same names do.
        needed = [objects / f"lib{name}.so" for name in ("torch_cpu", "torch_cuda")]
        for path in needed:
            self.spawn([nvcc, "-shared", "-x", "cu", os.devnull, f"-Xlinker=-soname={path.name}", "-o", str(path)])
        parts = [str(objects / "launch.o"), str(objects / "bindings.o")]
        link = "-Xlinker=" + ",".join(["--no-as-needed", *map(str, needed)])
        self.spawn([nvcc, "-shared", "-cudart=static", *parts, link, "-o", str(library)])


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


extension = Extension("mla_backend._kernels", ["csrc/launch.cu", "csrc/bindings.cpp"])
kernels = [extension] if kernels_wanted() else []
setup(ext_modules=kernels, cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})
