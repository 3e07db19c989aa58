"""The machine code of the Triton kernels, compiled for a GPU that need not be there, and read from its disassembly."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
MATRIX_PRODUCT = re.compile(r"(HMMA|HGMMA|UTC\w*MMA)\b")


class MachineCode(NamedTuple):
    """What the disassembly of a kernel shows.

    Attributes:
        registers: Registers of a thread.
        spills: Bytes of the stack and instructions that access it; 0 if all values stay in registers.
        matrix_products: Matrix instructions.
        narrow_loads: Loads of 16 bits from global memory in the longest loop, that over time steps or tokens.
        vector_loads: Loads of 64 or 128 bits from global memory, asynchronous copies included.
        loop_instructions: Instructions of this loop.
        loop_barriers: Barriers in this loop.
        loop_copies: Asynchronous copies from global to shared memory in this loop.
        copies: Asynchronous copies in the whole kernel.
    """

    registers: int
    spills: int
    matrix_products: int
    narrow_loads: int
    vector_loads: int
    loop_instructions: int
    loop_barriers: int
    loop_copies: int
    copies: int


def read_machine_code(binary: bytes, cuobjdump: str) -> MachineCode:
    """Disassembles a kernel.

    Args:
        binary: The kernel, as a cubin.
        cuobjdump: Path of NVIDIA's disassembler, which is part of Triton.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        usage, listing = (
            subprocess.run([cuobjdump, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    code = [(int(address, 16), name, rest) for address, name, rest in INSTRUCTION.findall(listing)]
    names = [name for _, name, _ in code]
    loop = _longest_loop(code)
    return MachineCode(
        registers=int(found[1]),
        spills=int(found[2]) + sum(name.split(".")[0] in ("LDL", "STL") for name in names),
        matrix_products=sum(bool(MATRIX_PRODUCT.match(name)) for name in names),
        narrow_loads=sum(name.startswith("LDG.") and name.endswith(("U16", "S16")) for name in loop),
        vector_loads=sum(name.startswith("LDG") and name.endswith((".64", ".128")) for name in names),
        loop_instructions=len(loop),
        loop_barriers=sum(name.startswith("BAR") for name in loop),
        loop_copies=sum(name.startswith("LDGSTS") for name in loop),
        copies=sum(name.startswith("LDGSTS") for name in names),
    )


def _longest_loop(code: list[tuple[int, str, str]]) -> list[str]:
    """Returns the names of the instructions between the target of a backward branch and the branch."""
    longest: list[str] = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest.strip())
        if name.startswith("BRA") and target and (first := int(target[1], 16)) < address:
            body = [other for at, other, _ in code if first <= at <= address]
            longest = max(longest, body, key=len)
    return longest
