"""Print what every kernel takes of a multiprocessor, and fail where one has lost what makes it fast.

    python csrc/resources.py

Compiles csrc/launch.cu for sm_90a and reads the compiler's report and the disassembly. A kernel may not spill registers
or touch local memory, and a decode kernel must do its products with wgmma (HGMMA in the disassembly) and know where its
own code lies (csrc/locate.py). Needs nvcc, and cuobjdump from CUDA or from triton.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parent


@dataclass
class Kernel:
    name: str
    registers: int
    static_shared: int
    spilled: int
    wgmma: int = 0
    local: int = 0
    code: int = 0  # bytes
    located: tuple[int, ...] = ()  # what LEPC says, from the beginning of its code on

    def problem(self) -> str:
        if self.spilled:
            return f"spills {self.spilled} bytes of registers"
        if self.local:
            return f"touches local memory {self.local} times"
        if self.name.startswith("decode") and self.wgmma == 0:
            return "has no wgmma"
        if self.name.startswith("decode") and self.located != (0, self.code):
            return f"looks for its {self.code} bytes of code at {self.located}"
        return ""


def find_cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends/nvidia/bin"))
    if found is None:
        raise SystemExit("resources.py: cuobjdump is neither on the PATH nor in an installed triton; install either.")
    return found


def readable(mangled: str) -> str:
    """Shorten a mangled name to the kernel's and its template arguments."""
    name = next(part for part in re.findall(r"\d+([a-z_]+?_kernel)", mangled))
    types = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "13__nv_fp8_e4m3": "fp8"}
    arguments = [short for long, short in types.items() if long in mangled] + re.findall(r"Li(\d+)E", mangled)
    return f"{name}<{', '.join(arguments)}>" if arguments else name


def compiled(cubin: Path) -> dict[str, Kernel]:
    command = ["nvcc", "-std=c++17", "-O3", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
    done = subprocess.run([*command, str(CSRC / "launch.cu"), "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    located = subprocess.run([sys.executable, str(CSRC / "locate.py"), str(cubin)], capture_output=True, text=True)
    if located.returncode != 0:
        raise SystemExit(located.stderr)
    kernels = {}
    for block in done.stderr.split("Compiling entry function '")[1:]:
        mangled = block[: block.index("'")]
        numbers = [
            re.search(p, block) for p in (r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes spill stores")
        ]
        registers, shared, spilled = (int(number[1]) if number else 0 for number in numbers)
        kernels[mangled] = Kernel(readable(mangled), registers, shared, spilled)
    return kernels


def disassembled(cubin: Path, kernels: dict[str, Kernel]) -> None:
    sass = subprocess.run([find_cuobjdump(), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True)
    for block in sass.stdout.split("Function : ")[1:]:
        kernel = kernels[block.split(None, 1)[0]]
        opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z]+)", block, re.MULTILINE))
        kernel.wgmma, kernel.local = opcodes["HGMMA"], opcodes["LDL"] + opcodes["STL"]
        kernel.code = int(re.findall(r"^\s+/\*([0-9a-f]{4,})\*/", block, re.MULTILINE)[-1], 16) + 16
        kernel.located = tuple(sorted(int(address, 16) for address in re.findall(r"LEPC R\d+, (0x[0-9a-f]+)", block)))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        kernels = compiled(cubin)
        disassembled(cubin, kernels)
    print(f"{'kernel':48} {'registers':>9} {'static shared':>13} {'spilled':>7} {'wgmma':>5} {'local':>5} {'code':>6}")
    for k in kernels.values():
        print(f"{k.name:48} {k.registers:9} {k.static_shared:13} {k.spilled:7} {k.wgmma:5} {k.local:5} {k.code:6}")
    problems = [f"{k.name} {k.problem()}" for k in kernels.values() if k.problem()]
    sys.exit("resources.py: " + "; ".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
