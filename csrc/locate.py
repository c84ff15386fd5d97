"""Tell compiled kernels where their own code lies.

    python csrc/locate.py FILE

No PTX instruction gives a kernel's address, and a pointer to one is no address either; but the machine has such an
instruction, LEPC. csrc/sm90/ptx.cuh reads two performance counters where it wants the addresses, and here, after
compilation, these reads become LEPC for the beginning and for the end of the kernel. FILE is an object file, a library
or a cubin, and is changed in place. Encodings are those of sm_90, whatever compiler wrote them; csrc/resources.py looks
at what the disassembler makes of them.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

CUDA_MACHINE = 190  # of an ELF header
INSTRUCTION = struct.Struct("<QQ")
OPCODE, OPERANDS = 0xFFF, 0xFFF000  # the latter are the predicate and the register that is written
READ_COUNTER, LEPC = 0x805, 0x94E
BEGIN, END = 0x16400, 0x16600  # all 64 bits of counters 0 and 1, in the second half of a READ_COUNTER
SCHEDULING = -1 << 41  # in the second half of any instruction: when it may start, and who waits for it
NO_SCOREBOARD = 7 << 46  # of these: nobody waits for a signal, which LEPC might not give


def kernels(binary: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield every kernel's mangled name, and where its code begins in the file and ends."""
    start = -1
    while (start := binary.find(b"\x7fELF", start + 1)) >= 0:
        if struct.unpack_from("<H", binary, start + 18)[0] != CUDA_MACHINE:
            continue
        (table,) = struct.unpack_from("<Q", binary, start + 40)
        size, count, names = struct.unpack_from("<HHH", binary, start + 58)
        sections = [struct.unpack_from("<IIQQQQ", binary, start + table + i * size) for i in range(count)]
        for name, _, _, _, offset, length in sections:
            at = start + sections[names][4] + name
            title = binary[at : binary.index(b"\0", at)].decode()
            if title.startswith(".text."):
                yield title.removeprefix(".text."), start + offset, start + offset + length


def reads(binary: bytes, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where in the code a counter is read, and which one."""
    for at in range(begin, end, INSTRUCTION.size):
        low, high = INSTRUCTION.unpack_from(binary, at)
        unawaited = high & NO_SCOREBOARD == NO_SCOREBOARD
        if low & OPCODE == READ_COUNTER and high & ~SCHEDULING in (BEGIN, END) and unawaited:
            yield at, high & ~SCHEDULING


def locate(binary: bytearray) -> None:
    """Replace the reads in every decode kernel; each must have one of either kind."""
    found = False
    for name, begin, end in list(kernels(binary)):
        if "decode_" not in name:
            continue
        found = True
        places = list(reads(binary, begin, end))
        if sorted(counter for _, counter in places) != [BEGIN, END]:
            raise SystemExit(
                f"locate.py: {name} reads the counters %pm0_64 and %pm1_64 in {len(places)} places, one of each is "
                "wanted. This compiler makes something else of code_begin() and code_end() in csrc/sm90/ptx.cuh; those "
                "of CUDA 12.8 to 13.5 are known to work."
            )
        for at, counter in places:
            low, high = INSTRUCTION.unpack_from(binary, at)
            distance = (begin if counter == BEGIN else end) - (at + INSTRUCTION.size)
            low = low & OPERANDS | LEPC | (distance << 24) % 2**64
            INSTRUCTION.pack_into(binary, at, low, high & SCHEDULING % 2**64 | (distance >> 40) % 2**22)
    if not found:
        raise SystemExit("locate.py: no decode kernel was found; FILE must hold them uncompressed (nvcc -no-compress).")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"locate.py: {len(sys.argv) - 1} arguments were given; it takes one, the file to change.")
    path = Path(sys.argv[1])
    contents = bytearray(path.read_bytes())
    locate(contents)
    path.write_bytes(contents)
