"""The choice of Triton kernels by the properties of a device, for every architecture."""

import pytest
import torch

from sequencer.ops import triton_kernels

triton_plans = pytest.importorskip("sequencer.ops.triton_plans", reason="triton is not installed")
kernel_check = pytest.importorskip("sequencer.measure.kernel_check", reason="triton is not installed")
DEVICES = kernel_check.DEVICES
PANELS = ("forward_panels", "backward_panels", "sums_panels")
RESIDENT = ("forward_resident", "backward_resident", "sums")
STREAMED = ("forward_streamed", "backward_streamed", "sums")
GRU = ("forward_gru_streamed", "backward_gru_streamed", "sums")


def plan(device, cell, D, dtype=torch.bfloat16):
    return triton_kernels.plan_of(device, cell, D, dtype)


def kernels(*case):
    return tuple(launch.kernel.__name__ for launch in plan(*case))


@pytest.mark.parametrize("capability", DEVICES)
def test_kernels_of_every_architecture(capability):
    device = DEVICES[capability]
    large = device.shared_memory > 160_000
    for dtype in (torch.bfloat16, torch.float16):
        assert kernels(device, "lstm", 48, dtype) == PANELS
        assert kernels(device, "lstm", 96, dtype) == PANELS
        assert kernels(device, "lstm", 24, dtype) == RESIDENT
        assert kernels(device, "lstm", 64, dtype) == RESIDENT
        assert kernels(device, "lstm", 100, dtype) == (RESIDENT if large else STREAMED)
        assert kernels(device, "lstm", 136, dtype) == STREAMED
        assert kernels(device, "indylstm", 256, dtype) == RESIDENT
    assert kernels(device, "lstm", 48, torch.float32) == STREAMED
    assert kernels(device, "indylstm", 48, torch.float32) == RESIDENT
    for cell in ("gru", "rnn", "rnn_relu"):
        assert kernels(device, cell, 48) == kernels(device, cell, 256, torch.float32) == GRU


@pytest.mark.parametrize("capability", DEVICES)
def test_tiles_fit_in_shared_memory(capability):
    device = DEVICES[capability]
    for cell in triton_kernels.CELLS:
        for dtype in triton_kernels.DTYPES:
            for D in range(8, 257):
                for launch in plan(device, cell, D, dtype):
                    tile = launch.tile
                    assert tile.programs * (tile.shared + 1024) <= device.shared_memory + 1024
                    assert tile.programs * tile.warps <= 48


def test_less_shared_memory_than_the_tables_need():
    """A device of a known generation whose programs may have less."""
    small = DEVICES[90]._replace(shared_memory=101_376)
    assert kernels(small, "lstm", 96) == STREAMED
    smaller = small._replace(shared_memory=49_152)
    assert kernels(smaller, "lstm", 48) == STREAMED
    assert kernels(smaller, "indylstm", 256, torch.float32) == RESIDENT
    assert plan(smaller, "indylstm", 256, torch.float32).forward.tile.stages == 1


@pytest.mark.parametrize("capability", [70, 110, 130])
def test_a_generation_that_no_table_was_compiled_for(capability):
    device = DEVICES[90]._replace(capability=capability)
    assert kernels(device, "lstm", 48) == kernels(device, "lstm", 24) == STREAMED
    assert kernels(device, "indylstm", 48) == RESIDENT
    assert kernels(device, "gru", 48) == GRU


@pytest.mark.parametrize(("capability", "like"), [(87, 80), (103, 100), (121, 120)])
def test_relatives_of_the_architectures(capability, like):
    device = DEVICES[like]
    assert plan(device._replace(capability=capability), "lstm", 96) == plan(device, "lstm", 96)


def test_partial_sums_fill_the_device_once():
    device = DEVICES[90]
    chosen = plan(device, "lstm", 96)
    tokens = 256 * 16 * 16
    programs = chosen.parts(device, 4, tokens) * 3 * 4
    assert programs == 132 * chosen.sums.tile.programs
    assert chosen.parts(device, 4, 65) == 2  # as many as there are blocks of 64 tokens
    assert chosen.parts(device, 4, 0) == 1


def test_precision_of_float32_products():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, expected in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(precision)
            constants = [launch.constants["PRECISION"] for launch in plan(DEVICES[90], "lstm", 48, torch.float32)]
            assert constants == [expected] * 3
    finally:
        torch.set_float32_matmul_precision(before)
