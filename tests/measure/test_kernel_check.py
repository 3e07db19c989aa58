"""The machine code of the Triton kernels, compiled without a GPU as a launch would compile them, and its judge."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sequencer.config.errors import RequestError
from sequencer.measure.machine_code import MachineCode, _longest_loop, read_machine_code
from sequencer.ops import triton_kernels

kernel_check = pytest.importorskip("sequencer.measure.kernel_check", reason="triton is not installed")
Launch, Tile = kernel_check.Launch, pytest.importorskip("sequencer.ops.triton_plans").Tile
ROOT = Path(__file__).parents[2]
LAYER, DEVICE = kernel_check.MODEL_LAYERS[0], kernel_check.DEVICES[90]

COMPILE = """
import json, sys
from sequencer.measure.kernel_check import ALL_LAYERS, MODEL_LAYERS, Layer, check_kernels
model = [*MODEL_LAYERS, Layer(48, cell="gru")]
layers, inference = (model, False) if sys.argv[2] == "model" else (ALL_LAYERS, True)
found = {layer.title: check_kernels(int(sys.argv[1]), layer, inference) for layer in layers}
print(json.dumps({title: [(kernel.name, kernel.faults) for kernel in kernels] for title, kernels in found.items()}))
"""


@pytest.mark.parametrize(
    ("capability", "layers"),
    [(90, "model"), *(pytest.param(c, "all", marks=pytest.mark.slow) for c in kernel_check.DEVICES)],
)
def test_kernels_as_they_are_launched(capability, layers):
    """In a process of its own, since these tests run Triton's interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), layers],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert {title: [kernel for kernel in kernels if kernel[1]] for title, kernels in found.items()} == {
        title: [] for title in found
    }
    panels = ["forward_panels", "backward_panels", "sums_panels"]
    expected = ["forward_panels, inference", *panels] if layers == "all" else panels
    assert [name for name, _ in found["lstm, D 48, bfloat16"]] == expected
    assert [name for name, _ in found["lstm, D 96, bfloat16"]] == expected
    gru = ["forward_gru_streamed, inference", "forward_gru_streamed", "backward_gru_streamed", "sums"]
    assert [name for name, _ in found["gru, D 48, bfloat16"]] == (gru if layers == "all" else gru[1:])


CODE = MachineCode(
    registers=128,
    spills=0,
    matrix_products=9,
    narrow_loads=0,
    vector_loads=24,
    loop_instructions=1085,
    loop_barriers=12,
    loop_copies=12,
    copies=24,
)
FAULTS = {
    "3 bytes of shared memory, planned 2": ({}, {"shared": 3, "planned": 2}),
    "300000 bytes of shared memory, the device has 232448": ({}, {"shared": 300_000, "planned": 300_000}),
    "spills registers (4)": ({"spills": 4}, {}),
    "no matrix instruction": ({"matrix_products": 0}, {}),
    "1 loads of 16 bits in the loop": ({"narrow_loads": 1}, {}),
    "no vector loads": ({"vector_loads": 0}, {}),
    "no asynchronous copy in the loop": ({"loop_copies": 0}, {}),
    "47 barriers in the loop, at most 46": ({"loop_barriers": 47}, {}),
    "1401 instructions in the loop, at most 1400": ({"loop_instructions": 1401}, {}),
    "1 programs on a multiprocessor, planned 2": ({}, {"programs": 1}),
}


def judged(code=CODE, name="forward_panels", shared=2, planned=2, programs=2, layer=LAYER):
    tile = Tile(64, 4, 2, planned, 2)
    launch = Launch(SimpleNamespace(__name__=name), tile, {})
    return kernel_check.judge(code, shared, programs, launch, DEVICE, layer)


def test_a_kernel_without_faults():
    assert judged() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault):
    changes, arguments = FAULTS[fault]
    assert judged(CODE._replace(**changes), **arguments) == [fault]


def test_faults_of_other_kernels():
    """Streamed kernels must not copy ahead; kernels for diagonal weights have no matrix product."""
    assert judged(name="forward_streamed") == ["asynchronous copies of what other threads write"]
    diagonal = kernel_check.Layer(48, torch.bfloat16, "indylstm")
    assert judged(CODE._replace(matrix_products=0), "forward_resident", layer=diagonal) == []


def test_the_longest_loop():
    """A branch to itself, which ends every kernel, and a branch forwards are no loops."""
    code = [
        (0x00, "LDG.E.128", "R4, [R2]"),
        (0x10, "BRA", "0x60"),
        (0x20, "LDGSTS.E.128", "[R1], [R2]"),
        (0x30, "BAR.SYNC", "0x0"),
        (0x40, "BRA", "0x30"),
        (0x50, "BRA", "0x20"),
        (0x60, "EXIT", ""),
        (0x70, "BRA", "0x70"),
    ]
    assert _longest_loop(code) == ["LDGSTS.E.128", "BAR.SYNC", "BRA", "BRA"]


def test_reading_machine_code(tmp_path):
    tool = tmp_path / "cuobjdump"
    tool.write_text("""#!/bin/sh
[ "$1" = -sass ] || { echo " REG:40 STACK:8 SHARED:0"; exit; }
cat <<'END'
        /*0000*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;   /* 0x0000000402047981 */
        /*0008*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0010*/              @P0  LDGSTS.E.BYPASS.LTC128B.128 [R11], desc[UR10][R2.64] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   STL [R1], R4 ;
        /*0040*/              @!P1 BRA 0x8 ;
        /*0050*/                   EXIT ;
END
""")
    tool.chmod(0o755)
    assert read_machine_code(b"", str(tool)) == MachineCode(
        registers=40,
        spills=9,
        matrix_products=1,
        narrow_loads=1,
        vector_loads=1,
        loop_instructions=5,
        loop_barriers=0,
        loop_copies=1,
        copies=1,
    )


def test_the_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: True)
    with pytest.raises(RequestError, match="TRITON_INTERPRET=1 has Triton interpret its kernels"):
        kernel_check.check_kernels(90, LAYER)
