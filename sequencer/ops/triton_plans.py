"""The choice of Triton kernels and their tiles by the properties of a device.

The tables hold what `python scripts/benchmark.py kernels` has compiled without register spills, in order of preference.
`choose_plan` takes the first entry that was compiled for the device's generation and fits in its shared memory. What no
entry serves, and devices of generations that no entry names, take the streamed kernels.

Shape letters: `S` number of directions, `D` hidden size, `P` the hidden size padded to a power of two, `Q` units of a
panel.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton

from sequencer.ops import reference, triton_gru, triton_panels, triton_resident, triton_streamed, triton_sums

SHARED_PER_PROGRAM = 1024  # bytes of shared memory that the system takes
SMALLEST_DOT = 16  # rows and columns of an operand of `tl.dot`


class Device(NamedTuple):
    """What the choice of kernels depends on.

    Attributes:
        capability: Compute capability, ten times the major number plus the minor one.
        shared_memory: Bytes of shared memory that a program may have.
        multiprocessors: Number of streaming multiprocessors.
    """

    capability: int
    shared_memory: int
    multiprocessors: int


class Tile(NamedTuple):
    """The part of the work that a program does at a time, and what it takes.

    Attributes:
        size: Sequences of a program, or tokens that `sums` reads at a time.
        warps: Warps of a program.
        stages: Steps whose loads are in flight, the present one included.
        shared: Bytes of shared memory, at most.
        programs: Programs that fit on a multiprocessor, at least.
    """

    size: int
    warps: int
    stages: int
    shared: int
    programs: int


class Launch(NamedTuple):
    """A kernel, its tile, and its compile-time constants and options other than `S`, `D` and `KEEP`.

    `blocks` is the number of blocks into which `sums` divides the weights of a direction, and 1 for other kernels.
    """

    kernel: Any
    tile: Tile
    constants: dict[str, Any]
    blocks: int = 1


class Plan(NamedTuple):
    """The kernels of a layer."""

    forward: Launch
    backward: Launch
    sums: Launch

    def parts(self, device: Device, S: int, tokens: int) -> int:
        """Returns the number of partial sums of the gradients of weights: the programs fill the device once."""
        wanted = device.multiprocessors * self.sums.tile.programs // (self.sums.blocks * S)
        return max(1, min(wanted, triton.cdiv(tokens, self.sums.tile.size)))


# by generation and `D`; forward, backward, sums
PANELS: dict[int, dict[int, tuple[Tile, ...]]] = {
    0: {},
    80: {
        48: (Tile(64, 4, 2, 51_200, 3), Tile(64, 4, 2, 63_488, 2), Tile(64, 4, 3, 22_528, 4)),
        96: (Tile(32, 8, 2, 114_688, 1), Tile(16, 4, 2, 100_352, 1), Tile(64, 8, 2, 32_768, 2)),
    },
    86: {
        48: (Tile(32, 4, 2, 38_912, 2), Tile(32, 4, 2, 40_960, 2), Tile(64, 4, 3, 22_528, 4)),
        96: (Tile(16, 4, 2, 90_112, 1), Tile(16, 4, 2, 100_352, 1), Tile(64, 8, 2, 32_768, 1)),
    },
    90: {
        48: (Tile(64, 4, 2, 57_344, 3), Tile(64, 4, 2, 63_488, 2), Tile(64, 4, 3, 35_328, 6)),
        96: (Tile(32, 4, 2, 100_352, 2), Tile(64, 8, 2, 180_224, 1), Tile(64, 8, 3, 71_680, 2)),
    },
    100: {
        48: (Tile(32, 4, 2, 38_912, 3), Tile(32, 4, 2, 40_960, 2), Tile(64, 4, 3, 43_568, 4)),
        96: (Tile(32, 4, 2, 100_352, 2), Tile(16, 4, 2, 98_304, 2), Tile(64, 8, 3, 88_112, 2)),
    },
}
# by generation and `P`; forward, backward
_SMALL: dict[int, tuple[Tile, ...]] = {
    16: (Tile(32, 4, 3, 11_264, 4), Tile(32, 4, 2, 10_240, 4)),
    32: (Tile(32, 4, 3, 26_624, 3), Tile(32, 4, 2, 22_528, 3)),
}
_MEDIUM: dict[int, tuple[Tile, ...]] = {64: (Tile(32, 8, 3, 69_632, 2), Tile(32, 8, 2, 77_824, 2))}
RESIDENT: dict[int, dict[int, tuple[Tile, ...]]] = {
    0: {},
    80: {**_SMALL, **_MEDIUM, 128: (Tile(16, 8, 2, 151_552, 1), Tile(16, 8, 1, 151_552, 1))},
    86: {**_SMALL, 64: (Tile(32, 8, 3, 69_632, 1), Tile(32, 8, 2, 77_824, 1))},
    90: {**_SMALL, **_MEDIUM, 128: (Tile(32, 16, 2, 172_032, 1), Tile(16, 8, 2, 176_128, 1))},
    100: {**_SMALL, **_MEDIUM, 128: (Tile(16, 8, 2, 151_552, 1), Tile(16, 8, 2, 176_128, 1))},
}
# of diagonal weights, by `P`, for every generation; forward, backward
DIAGONAL: dict[int, tuple[Tile, ...]] = {
    16: (Tile(32, 4, 2, 8_192, 4), Tile(32, 4, 2, 12_288, 4)),
    32: (Tile(32, 4, 2, 16_384, 4), Tile(32, 4, 2, 24_576, 4)),
    64: (Tile(32, 8, 2, 32_768, 2), Tile(32, 8, 2, 49_152, 2)),
    128: (Tile(16, 8, 2, 32_768, 2), Tile(16, 8, 2, 49_152, 2)),
    256: (Tile(16, 8, 2, 65_536, 1), Tile(16, 8, 2, 98_304, 1)),
}
# by bytes of an element
STREAMED = {2: Tile(16, 4, 1, 34_816, 2), 4: Tile(16, 4, 1, 4_096, 2)}
GRU = Tile(16, 4, 1, 4_096, 2)  # also of plain RNNs
# left to itself, the assembler spills a few registers in some sizes to make room for another program; ROCm has no limit
ALL_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}
# by bytes of an element; for two bytes and generations whose code is another, by generation
SUMS = {2: Tile(128, 8, 2, 34_816, 1), 4: Tile(32, 8, 2, 16_384, 1)}
OTHER_SUMS = {90: Tile(128, 8, 2, 51_200, 2), 100: Tile(128, 8, 2, 67_600, 2)}
BLOCK = {2: 64, 4: 32}  # the most units of a block, by bytes of an element


@functools.cache
def choose_plan(device: Device, cell: str, D: int, itemsize: int, precision: str) -> Plan:
    """Chooses the kernels of a layer.

    Args:
        device: The device.
        cell: The cell.
        D: Hidden size.
        itemsize: Bytes of an element of the inputs.
        precision: Precision of products in float32, as `tl.dot` takes it.
    """
    P, diagonal = max(SMALLEST_DOT, triton.next_power_of_2(D)), cell == "indylstm"
    generation, narrow = _generation(device), itemsize == 2
    approximate = {"APPROXIMATE": narrow}
    if narrow and cell == "lstm" and _fits(device, tiles := PANELS[generation].get(D, ())):
        forward, backward, tile = tiles
        panel = {"Q": D // 3}
        return Plan(
            _scan(triton_panels.forward_panels, forward, panel | approximate),
            _scan(triton_panels.backward_panels, backward, panel | approximate),
            _sums(triton_panels.sums_panels, tile, panel, 3),
        )
    block = min(P, BLOCK[itemsize])
    G = reference.CELLS[cell].gates
    blocks = G * triton.cdiv(D, block) ** (1 if diagonal else 2)
    constants = {"G": G, "DIAGONAL": diagonal, "PRECISION": precision, "BLOCK": block} | ALL_REGISTERS
    tile = OTHER_SUMS.get(generation, SUMS[2]) if narrow else SUMS[4]
    sums = _sums(triton_sums.sums, tile, constants, blocks)
    if G < 4:  # a GRU or a plain RNN
        constants = {"CELL": cell, "PRECISION": precision, "TILE": GRU.size} | ALL_REGISTERS
        block = 16 if generation in (80, 86) and not narrow else min(P, BLOCK[4])  # 32 spill registers
        return Plan(
            Launch(triton_gru.forward_gru_streamed, GRU, constants | {"BLOCK": block}),
            Launch(triton_gru.backward_gru_streamed, GRU, constants | {"BLOCK": min(P, BLOCK[4])}),
            sums,
        )
    tiles = DIAGONAL[P] if diagonal else RESIDENT[generation].get(P, ()) if narrow else ()
    if diagonal and not _fits(device, tiles):  # without loads ahead, which take the shared memory
        tiles = tuple(tile._replace(stages=1, shared=0, programs=1) for tile in DIAGONAL[P])
    if _fits(device, tiles):
        padded = {"P": P, "DIAGONAL": diagonal} | approximate
        forward, backward = tiles
        return Plan(
            _scan(triton_resident.forward_resident, forward, padded),
            _scan(triton_resident.backward_resident, backward, padded),
            sums,
        )
    tile = STREAMED[itemsize]
    block = 16 if generation == 86 and not narrow else block  # 32 spill registers
    constants = {"PRECISION": precision, "TILE": tile.size}
    limit = ALL_REGISTERS if D % block else {}  # where all blocks are whole, the limit is what makes it spill
    narrower = {"BLOCK": min(P, BLOCK[4])} | ALL_REGISTERS  # a block of 64 spills
    return Plan(
        Launch(triton_streamed.forward_streamed, tile, constants | {"BLOCK": block} | limit),
        Launch(triton_streamed.backward_streamed, tile, constants | narrower),
        sums,
    )


def _generation(device: Device) -> int:
    """Returns the key of the tables for a device; 0, which has no entries, for one that no table was compiled for."""
    major = device.capability // 10
    if major in (9, 10):
        return 10 * major
    if major not in (8, 12):
        return 0
    return 80 if device.shared_memory >= 166_912 else 86


def _fits(device: Device, tiles: tuple[Tile, ...]) -> bool:
    """Returns whether there are tiles, and the shared memory of a multiprocessor holds the programs of each."""
    available = device.shared_memory + SHARED_PER_PROGRAM
    return bool(tiles) and all(tile.programs * (tile.shared + SHARED_PER_PROGRAM) <= available for tile in tiles)


def _scan(kernel: Any, tile: Tile, constants: dict[str, Any]) -> Launch:
    return Launch(kernel, tile, constants | {"TILE": tile.size, "STAGES": tile.stages})


def _sums(kernel: Any, tile: Tile, constants: dict[str, Any], blocks: int) -> Launch:
    return Launch(kernel, tile, constants | {"ROWS": tile.size, "STAGES": tile.stages}, blocks)
