"""The Triton kernels as production would compile them, judged by their machine code, without a GPU.

The launchers run on tensors of the meta device under a stub of Triton's driver, so that plans, signatures and
specialisations are those of a real launch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sequencer.config.errors import RequestError
from sequencer.measure.machine_code import MachineCode, read_machine_code
from sequencer.ops import CELLS, triton_kernels
from sequencer.ops.fused import biases
from sequencer.ops.triton_plans import SHARED_PER_PROGRAM, Device, Launch

DEVICES = {  # by compute capability; the number of multiprocessors is that of one GPU of this architecture
    80: Device(80, 166_912, 108),
    86: Device(86, 101_376, 84),
    89: Device(89, 101_376, 128),
    90: Device(90, 232_448, 132),
    100: Device(100, 232_448, 148),
    120: Device(120, 101_376, 170),
}
REGISTERS = 65_536  # of a multiprocessor
WARPS = {80: 64, 90: 64, 100: 64}  # of a multiprocessor; 48 on the others
# the most barriers and instructions in the loop over steps (or tokens, for sums)
CEILINGS = {
    "forward_panels": (46, 1400),
    "backward_panels": (20, 1550),
    "sums_panels": (42, 740),
    "forward_resident": (20, 1690),
    "backward_resident": (22, 1100),
    "sums": (18, 860),
    "forward_streamed": (62, 2200),
    "backward_streamed": (100, 1400),
    "forward_gru_streamed": (86, 1600),
    "backward_gru_streamed": (94, 1000),
}


@dataclass(frozen=True)
class Layer:
    """A layer whose kernels are compiled: `H x H` tokens, `C` channels, hidden size `D`."""

    D: int
    dtype: torch.dtype = torch.bfloat16
    cell: str = "lstm"
    H: int = 32
    C: int = 192
    B: int = 256

    @property
    def title(self) -> str:
        """Cell, hidden size and dtype."""
        return f"{self.cell}, D {self.D}, {str(self.dtype).removeprefix('torch.')}"


MODEL_LAYERS = [Layer(48), Layer(96, H=16, C=384)]  # of sequencer2d_s
ALL_LAYERS = [
    *MODEL_LAYERS,
    Layer(48, torch.float16),
    *(Layer(D) for D in (8, 24, 64, 100, 136, 256)),
    *(Layer(D, torch.float32) for D in (48, 96)),
    *(
        Layer(D, dtype, cell)
        for cell in triton_kernels.CELLS[1:]
        for dtype in (torch.bfloat16, torch.float32)
        for D in (8, 24, 48, 96, 256)
    ),
]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: Name of the kernel, with `, inference` if it keeps nothing for the backward pass.
        tile: Sequences or tokens, warps and stages.
        shared: Bytes of shared memory.
        programs: Programs that fit on a multiprocessor.
        code: Its machine code.
        faults: What is wrong with it.
    """

    name: str
    tile: str
    shared: int
    programs: int
    code: MachineCode
    faults: list[str]

    def row(self) -> tuple[str | int, ...]:
        """The cells of a table: see `KERNEL_COLUMNS` of `scripts/benchmark.py`."""
        code = self.code
        loop = (code.loop_instructions, code.loop_barriers, code.loop_copies)
        return self.name, self.tile, code.registers, self.shared, self.programs, code.matrix_products, *loop


class _Driver:
    """What a launch that only compiles asks of Triton's driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def check_kernels(capability: int, layer: Layer, inference: bool = True) -> list[Kernel]:
    """Compiles and judges the kernels of the forward and the backward pass of a layer.

    Triton's driver is replaced for the rest of the process.

    Args:
        capability: A key of `DEVICES`.
        layer: The layer.
        inference: Whether the forward kernel of inference is compiled too.

    Raises:
        RequestError: Triton runs its interpreter.
    """
    if triton_kernels.interpreted():
        raise RequestError("TRITON_INTERPRET=1 has Triton interpret its kernels instead of compiling them: unset it")
    device = DEVICES[capability]
    with _recorded(device) as launches:
        _run(layer, inference)
    with _recorded(device) as others:
        _run(replace(layer, B=1, H=7), inference)
    planned = {
        launch.kernel.__name__: launch for launch in triton_kernels.plan_of(device, layer.cell, layer.D, layer.dtype)
    }
    kernels = []
    for (name, compiled, keep), (_, other, _) in zip(launches, others, strict=True):
        launch, shared = planned[name], compiled.metadata.shared
        code = read_machine_code(compiled.asm["cubin"], _cuobjdump())
        programs = _programs(device, code.registers, shared, launch.tile.warps)
        faults = judge(code, shared, programs, launch, device, layer)
        faults += ["compiled again for one image of another size"] if other is not compiled else []
        tile = "/".join(map(str, launch.tile[:3]))
        kernels.append(Kernel(f"{name}{'' if keep else ', inference'}", tile, shared, programs, code, faults))
    return kernels


def judge(code: MachineCode, shared: int, programs: int, launch: Launch, device: Device, layer: Layer) -> list[str]:
    """Returns what is wrong with a kernel, one phrase for each fault."""
    name, tile = launch.kernel.__name__, launch.tile
    barriers, instructions = CEILINGS[name]
    streamed = name.endswith("_streamed")
    aligned = layer.D % 8 == 0 and not streamed
    checks = {
        f"{shared} bytes of shared memory, the device has {device.shared_memory}": shared > device.shared_memory,
        f"{shared} bytes of shared memory, planned {tile.shared}": shared > tile.shared,
        f"spills registers ({code.spills})": code.spills > 0,
        "no matrix instruction": layer.cell != "indylstm" and not code.matrix_products,
        f"{code.narrow_loads} loads of 16 bits in the loop": aligned and code.narrow_loads > 0,
        "no vector loads": aligned and not code.vector_loads,
        "no asynchronous copy in the loop": name in ("forward_panels", "forward_resident") and not code.loop_copies,
        "asynchronous copies of what other threads write": streamed and code.copies > 0,
        f"{code.loop_barriers} barriers in the loop, at most {barriers}": code.loop_barriers > barriers,
        f"{code.loop_instructions} instructions in the loop, at most {instructions}": code.loop_instructions
        > instructions,
        f"{programs} programs on a multiprocessor, planned {tile.programs}": programs < tile.programs,
    }
    return [fault for fault, found in checks.items() if found]


def _cuobjdump() -> str:
    tool = knobs.nvidia.cuobjdump
    return getattr(tool, "path", tool)


def _programs(device: Device, registers: int, shared: int, warps: int) -> int:
    """Returns the number of programs that fit on a multiprocessor; a warp is given registers in units of 256."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_memory = (device.shared_memory + SHARED_PER_PROGRAM) // (shared + SHARED_PER_PROGRAM)
    return min(by_registers, by_memory, WARPS.get(device.capability, 48) // warps, 32)


@contextmanager
def _recorded(device: Device) -> Iterator[list[tuple[str, Any, bool]]]:
    """Has launches compile for a device instead of running; yields their names, binaries and values of `KEEP`."""
    launches = []
    run, device_of = JITFunction.run, triton_kernels.device_of

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **constants)
        launches.append((self.__name__, compiled, constants.get("KEEP", True)))

    driver.set_active(_Driver(device.capability))
    JITFunction.run, triton_kernels.device_of = record, lambda x: device
    try:
        yield launches
    finally:
        JITFunction.run, triton_kernels.device_of = run, device_of


def _run(layer: Layer, inference: bool) -> None:
    """Runs the launchers on tensors without storage."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=layer.dtype, device="meta")

    cell, directions, D = layer.cell, [0, 1, 2, 3], layer.D
    rows = CELLS[cell].gates * D
    x, weight_ih, bias = empty(layer.B, layer.H, layer.H, layer.C), empty(4 * rows, layer.C), empty(4, biases(cell) * D)
    weight_hh = empty(4, rows) if cell == "indylstm" else empty(4, rows, D)
    packed = triton_kernels.pack(weight_hh, cell)
    if inference:
        triton_kernels.forward(x, weight_ih, packed, bias, cell, directions, False)
    out, *kept = triton_kernels.forward(x, weight_ih, packed, bias, cell, directions, True)
    gates, cells = (empty(0) if tensor is None else tensor for tensor in kept)
    triton_kernels.backward(torch.empty_like(out), x, weight_ih, weight_hh, bias, cell, directions, out, gates, cells)
