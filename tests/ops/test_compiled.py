"""Whole models by torch.compile, as one graph, equal themselves without it."""

import subprocess
import sys

import pytest

from sequencer.ops import cpu, triton_kernels

# in processes of their own, since the run-time type checks of the tests cannot be compiled
COMPILED = """
import os, sys, timm, torch, sequencer
from sequencer.ops import configure
torch.manual_seed(0)
compiler, *cases = sys.argv[1:]
for case in cases:
    print(case, flush=True)
    backend, cell = case.split(":")
    configure(backend)
    torch.compiler.reset()
    model = timm.create_model(
        "sequencer2d_t_8", num_classes=10, cell=cell, layers=(1, 1), hidden_sizes=(8, 8), img_size=4
    )
    torch.nn.init.normal_(model.head.fc.weight)
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    x, upstream = torch.randn(3, 1, 4, 4), torch.randn(3, 10)
    (expected, actual) = (
        [y, *torch.autograd.grad(y, list(model.parameters()), upstream)] for y in (model(x), compiled(x))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(x).dtype == model(x).dtype == torch.bfloat16
"""


@pytest.mark.slow
def test_whole_models_compile_to_one_graph():
    missing = {"fused": cpu.unavailable(), "triton": triton_kernels.unavailable()}
    backends = [backend for backend, reason in missing.items() if reason is None]
    if not backends:
        pytest.skip(f"no kernel: {missing}")
    cases = [f"{backend}:{cell}" for backend in backends for cell in triton_kernels.CELLS]
    subprocess.run([sys.executable, "-c", COMPILED, "aot_eager", *cases], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "indylstm", "gru", "lstm1997"])
def test_whole_models_compile_with_inductor(cell):
    subprocess.run([sys.executable, "-c", COMPILED, "inductor", f"auto:{cell}"], check=True)
