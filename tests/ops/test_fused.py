"""The fused kernels against the reference in float64, and torch's contract for custom operators."""

import copy
import itertools

import pytest
import torch
from torch import nn

from sequencer.layers import RNN, RNN1d
from sequencer.ops import CELLS, Weights, cpu, cpu_kernel, fused, rnn2d, triton_kernels

# of the interpreter of Triton 3.6, with NumPy 2.3
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
HAVE_TRITON = triton_kernels.unavailable() is None
BACKENDS = [
    pytest.param("fused", marks=pytest.mark.skipif(bool(cpu.unavailable()), reason=f"no kernel: {cpu.unavailable()}")),
    pytest.param("triton", marks=pytest.mark.skipif(not HAVE_TRITON, reason=f"{triton_kernels.unavailable()}")),
]
DEVICE = {"fused": "cpu", "triton": "cpu" if triton_kernels.interpreted() else "cuda"}
SLOW = {"fused": False, "triton": triton_kernels.interpreted()}  # the interpreter takes small shapes
ALL = [0, 1, 2, 3]
CASES = [
    *(pytest.param("fused", cell, marks=BACKENDS[0].marks) for cell in cpu.CELLS),
    *(pytest.param("triton", cell, marks=BACKENDS[1].marks) for cell in triton_kernels.CELLS[:-1]),
    pytest.param("triton", "rnn_relu", marks=[*BACKENDS[1].marks, pytest.mark.slow]),  # as rnn but for the activation
]

# relative RMS error of outputs and of every gradient
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def poisoned():
    """Fills uninitialised memory with NaN, so that reading it is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(cell, B, H, W, D, directions=ALL, dtype=torch.float32, device="cpu", C=11):
    """Draws the inputs of a layer, `[x, *parameters of each direction]`, and the gradient of its outputs."""
    torch.manual_seed(0)
    shapes = CELLS[cell].shapes(C, D)
    scale = {"weight_ih": 0.3, "weight_hh": D**-0.5, "weight_ch": 0.5}
    x = torch.randn(B, H, W, C)
    flat = [x, *(torch.randn(shapes[name]) * scale.get(name, 0.2) for _ in directions for name in parameters(cell))]
    upstream = torch.randn(B, H, W, len(directions) * D)
    return [t.to(device, dtype).requires_grad_() for t in flat], upstream.to(device, dtype)


def parameters(cell):
    """The parameters that a direction has; both biases of a GRU enter its outputs in different ways, others add up."""
    return [name for name in CELLS[cell].shapes(1, 1) if name != "bias_hh" or cell == "gru"]


def weights_of(flat, cell):
    names = parameters(cell)
    return [Weights(**dict(zip(names, flat[i : i + len(names)], strict=True))) for i in range(1, len(flat), len(names))]


def reference(cell, flat, upstream, directions, dtype=torch.float64):
    """Computes outputs and gradients by the reference backend."""
    flat = [t.detach().to("cpu", dtype).requires_grad_() for t in flat]
    outputs = []
    for direction, w in zip(directions, weights_of(flat, cell), strict=True):
        x = flat[0].flip(1 if direction < 2 else 2) if direction % 2 else flat[0]
        y = rnn2d(x, *([[(w,)], None] if direction < 2 else [None, [(w,)]]), cell, backend="reference")
        outputs.append(y.flip(1 if direction < 2 else 2) if direction % 2 else y)
    y = torch.cat(outputs, -1)
    return [y.detach(), *torch.autograd.grad(y, flat, upstream.to("cpu", dtype))]


def fused_results(backend, cell, flat, upstream, directions, recompute=False):
    y = fused.run(flat[0], fused.pack(weights_of(flat, cell), cell), cell, directions, backend, recompute)
    return [y.detach(), *torch.autograd.grad(y, flat, upstream)]


def errors(actual, exact):
    return [
        float((a.cpu().double() - e).norm() / e.norm().clamp_min(1e-12)) for a, e in zip(actual, exact, strict=True)
    ]


def check(backend, cell, flat, upstream, directions=ALL):
    """Compares outputs and gradients with the reference in float64.

    The error of each tensor is below `TOLERANCE`, or at most 3 times that of the reference in float32 where that is
    more.
    """
    exact, dtype = reference(cell, flat, upstream, directions), flat[0].dtype
    plain = reference(cell, flat, upstream, directions, torch.float32)
    actual = fused_results(backend, cell, flat, upstream, directions)
    assert all(tensor.dtype == dtype for tensor in actual)
    limits = [max(TOLERANCE[dtype], 3 * error) for error in errors(plain, exact)]
    for error, limit, tensor in zip(errors(actual, exact), limits, actual, strict=True):
        assert error < limit, f"error {error:.1e} of a tensor of shape {tuple(tensor.shape)}; limit {limit:.1e}"


OTHERS = [cell for cell in cpu.CELLS if cell not in ("lstm", "indylstm")]
MAPS = [(3, 5, 7), (5, 1, 33), (1, 9, 1), (1, 1, 1), (2, 16, 16)]


# not D=1 on the largest map: the gradient of a single weight, summed over 512 tokens, exceeds float32's precision
@pytest.mark.parametrize(
    ("cell", "size", "D"),
    [
        *(
            (cell, size, D)
            for cell in ("lstm", "indylstm")
            for size in MAPS
            for D in (1, 8, 24, 48, 96, 100)
            if D > 1 or size != MAPS[-1]
        ),
        *((cell, MAPS[0], D) for cell in OTHERS for D in (3, 8, 24, 48, 100)),
        *((cell, size, 24) for cell in OTHERS for size in MAPS[1:]),
    ],
)
@pytest.mark.parametrize("backend", [BACKENDS[0]])
def test_cpu_kernel_in_float32(backend, cell, size, D):
    flat, upstream = problem(cell, *size, D)
    check(backend, cell, flat, upstream)


SMALL = [
    (torch.float16, (3, 2, 3), 48),  # in panels
    (torch.float16, (1, 1, 3), 96),
    (torch.float16, (5, 1, 4), 8),  # resident
    (torch.float16, (1, 1, 1), 24),
    (torch.float16, (1, 1, 2), 100),
    (torch.float32, (3, 2, 2), 8),  # streamed
    (torch.float32, (1, 1, 1), 24),
    (torch.float32, (1, 1, 2), 40),
]
LARGER = [((3, 2, 5), 48), ((2, 3, 2), 96), ((5, 1, 9), 8), ((1, 2, 2), 100), ((1, 1, 2), 136)]


@pytest.mark.parametrize(
    ("cell", "dtype", "size", "D"),
    [
        *((cell, *case) for cell in ("lstm", "indylstm") for case in SMALL),
        *((cell, torch.float16, (5, 2, 4), 24) for cell in ("gru", "rnn", "rnn_relu")),
        *((cell, torch.float32, (1, 1, 2), 40) for cell in ("gru", "rnn", "rnn_relu")),
        *(
            pytest.param(cell, dtype, size, D, marks=pytest.mark.slow)
            for cell in triton_kernels.CELLS
            for dtype in (torch.float32, torch.float16)
            for size, D in LARGER
        ),
    ],
)
@pytest.mark.parametrize("backend", [BACKENDS[1]])
def test_triton_kernels(backend, cell, dtype, size, D):
    """The dtype and the hidden size decide between kernels in panels, resident and streamed ones."""
    flat, upstream = problem(cell, *size, D, dtype=dtype, device=DEVICE[backend])
    check(backend, cell, flat, upstream)


@pytest.mark.parametrize("backend", [BACKENDS[1]])
def test_streamed_kernels_in_float16(backend, monkeypatch):
    """On a device for which there is no other kernel."""
    if triton_kernels.interpreted():
        device = triton_kernels.device_of(torch.empty(0))._replace(capability=110)
        monkeypatch.setattr(triton_kernels, "device_of", lambda x: device)
    flat, upstream = problem("lstm", 2, 1, 2, 72, [2, 3], dtype=torch.float16, device=DEVICE[backend])
    check(backend, "lstm", flat, upstream, [2, 3])


@pytest.mark.parametrize("directions", [[0], [1], [2], [3], [1, 2], [2, 3]])
@pytest.mark.parametrize(("backend", "cell"), CASES)
def test_any_set_of_directions(backend, cell, directions):
    flat, upstream = problem(cell, 2, 3, 4, 8, directions, device=DEVICE[backend])
    check(backend, cell, flat, upstream, directions)


@pytest.mark.parametrize("instructions", ["AMX", "AVX512-BF16", "none"])
@pytest.mark.parametrize(
    ("cell", "size"),
    [
        *itertools.product(cpu.CELLS, [(*MAPS[0], 24), (*MAPS[0], 2), (*MAPS[1], 100), (1, 1, 1, 7), (*MAPS[-1], 48)]),
        # not for the others: the relative error of a single number, which is a sum with cancellation, has no bound
        *((cell, (*MAPS[0], 1)) for cell in ("lstm", "gru", "rnn", "rnn_relu", "indylstm")),
    ],
)
@pytest.mark.parametrize("backend", [BACKENDS[0]])
def test_bfloat16_on_a_cpu(backend, cell, size, instructions, monkeypatch):
    if not {"AMX": cpu_kernel.has_tiles(), "AVX512-BF16": cpu_kernel.has_bfloat16(), "none": True}[instructions]:
        pytest.skip(f"the processor has no {instructions}")
    monkeypatch.setattr(cpu_kernel, "has_bfloat16", lambda: instructions != "none")
    monkeypatch.setattr(cpu_kernel, "has_tiles", lambda: instructions == "AMX")
    monkeypatch.setattr(cpu_kernel, "library", cpu_kernel.library.__wrapped__)
    flat, upstream = problem(cell, *size, dtype=torch.bfloat16)
    check(backend, cell, flat, upstream)


@pytest.mark.parametrize("backend", [BACKENDS[0]])
def test_float16_on_a_cpu(backend):
    flat, upstream = problem("lstm", 3, 5, 7, 24, dtype=torch.float16)
    check(backend, "lstm", flat, upstream)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the interpreter multiplies bfloat16 wrongly")
@pytest.mark.parametrize("D", [48, 96, 160])
@pytest.mark.parametrize("cell", triton_kernels.CELLS)
def test_bfloat16_on_a_gpu(cell, D):
    flat, upstream = problem(cell, 4, 16, 16, D, dtype=torch.bfloat16, device="cuda")
    check("triton", cell, flat, upstream)


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("backend", [BACKENDS[0]])
def test_every_instruction_set(backend, cell, capability, monkeypatch):
    """The kernels for processors with less instructions than this one has are as exact."""
    sets = ["DEFAULT", "AVX2", "AVX512"]
    if capability not in sets[: sets.index(torch.backends.cpu.get_cpu_capability()) + 1]:
        pytest.skip(f"the processor has no {capability}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_kernel, "FLAGS", [*cpu_kernel.FLAGS, "-Wno-psabi"])
    monkeypatch.setattr(cpu_kernel, "library", cpu_kernel.library.__wrapped__)
    assert cpu_kernel.library(cell, torch.float32).lanes() == (16 if capability == "AVX512" else 8)
    check(backend, cell, *problem(cell, 3, 5, 7, 48))


@pytest.mark.parametrize("backend", [BACKENDS[0]])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_images_and_threads(backend, threads, monkeypatch):
    """The batch is processed in several chunks, and the number of tiles is no multiple of the number of threads."""
    monkeypatch.setitem(cpu.CHUNK, torch.float32, 4096)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for cell in cpu.CELLS:
            flat, upstream = problem(cell, 11, 5, 7, 8)
            check(backend, cell, flat, upstream)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_and_expanded_gradient(backend):
    flat, _ = problem("lstm", 2, 4, 3, 8, device=DEVICE[backend])
    flat[0] = flat[0].detach().permute(0, 2, 1, 3).requires_grad_()
    upstream = torch.randn(32, device=DEVICE[backend]).expand(2, 3, 4, 32)
    check(backend, "lstm", flat, upstream)


@pytest.mark.parametrize(("backend", "cell"), CASES)
def test_recompute_changes_only_memory(backend, cell):
    B, H, W, D = (1, 2, 2, 8) if SLOW[backend] else (2, 3, 4, 8)
    flat, upstream = problem(cell, B, H, W, D, device=DEVICE[backend])
    plain, again = (fused_results(backend, cell, flat, upstream, ALL, recompute) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

    def kept(recompute):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            fused.run(flat[0], fused.pack(weights_of(flat, cell), cell), cell, ALL, backend, recompute)
        return sum(sizes)

    assert kept(False) - kept(True) == B * H * W * 4 * sum(fused.KEPT[cell]) * D


@pytest.mark.parametrize(("backend", "cell"), CASES)
def test_results_are_deterministic(backend, cell):
    size = (2, 3, 2) if SLOW[backend] else (3, 5, 7)
    flat, upstream = problem(cell, *size, 8, device=DEVICE[backend])
    y = fused.run(flat[0], fused.pack(weights_of(flat, cell), cell), cell, ALL, backend, False)
    first = torch.autograd.grad(y, flat, upstream, retain_graph=True)
    second = torch.autograd.grad(y, flat, upstream)  # the backward pass may run twice on one graph
    third = fused_results(backend, cell, flat, upstream, ALL)[1:]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    flat, _ = problem("lstm", 0, 3, 4, 8, device=DEVICE[backend])
    y, *gradients = fused_results(backend, "lstm", flat, torch.zeros(0, 3, 4, 32, device=DEVICE[backend]), ALL)
    assert y.shape == (0, 3, 4, 32)
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # raised by the interpreter for 1 / (1 + inf)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_propagates_and_extremes_stay_finite(backend):
    flat, _ = problem("lstm", 1, 1, 3, 8, [2], device=DEVICE[backend])
    flat[0].data[0, 0, 1, 0] = torch.nan
    y = fused.run(flat[0], fused.pack(weights_of(flat, "lstm"), "lstm"), "lstm", [2], backend, False)
    assert y[0, 0, 0].isfinite().all()
    assert y[0, 0, 1:].isnan().all()
    flat[0].data.fill_(1e6)
    y = fused.run(flat[0], fused.pack(weights_of(flat, "lstm"), "lstm"), "lstm", [2], backend, False)
    assert y.isfinite().all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("backend", "cell"), CASES)
def test_higher_derivatives(backend, cell, recompute):
    """Second and third derivatives by all tensors, the upstream gradient included, are those of the reference."""
    flat, upstream = problem(cell, 2, 3, 2, 8, device=DEVICE[backend])
    upstream.requires_grad_()

    def derivatives(y, tensors, upstream):
        first = torch.autograd.grad(y, tensors, upstream, create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), [*tensors, upstream], create_graph=True, allow_unused=True
        )
        third = torch.autograd.grad(sum(g.square().sum() for g in second), tensors)
        return [*second, *third]

    actual = derivatives(
        fused.run(flat[0], fused.pack(weights_of(flat, cell), cell), cell, ALL, backend, recompute), flat, upstream
    )
    double = [t.detach().double().cpu().requires_grad_() for t in flat]
    vertical, horizontal = ([tuple(weights_of(double, cell)[first : first + 2])] for first in (0, 2))
    y = rnn2d(double[0], vertical, horizontal, cell, backend="reference")
    exact = derivatives(y, double, upstream.detach().double().cpu().requires_grad_())
    assert max(errors([t.detach() for t in actual], [t.detach() for t in exact])) < 1e-4


@pytest.mark.parametrize("part", ["input", "weight"])
def test_second_derivatives_by_one_tensor(part):
    """As in a gradient penalty, where the other tensors need no gradient."""
    flat, _ = problem("lstm", 2, 3, 2, 8)
    chosen = flat[0 if part == "input" else 1]
    results = []
    for backend in ("fused", "reference"):
        tensors = [t.detach().requires_grad_(t is chosen) for t in flat]
        vertical, horizontal = ([tuple(weights_of(tensors, "lstm")[first : first + 2])] for first in (0, 2))
        y = rnn2d(tensors[0], vertical, horizontal, backend=backend)
        (target,) = (t for t in tensors if t.requires_grad)
        (gradient,) = torch.autograd.grad(y.square().sum(), target, create_graph=True)
        gradient.square().sum().backward()
        results.append(target.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised by opcheck itself
@pytest.mark.parametrize(
    ("backend", "cell", "keep"),
    [
        *(pytest.param(*case.values, True, marks=case.marks) for case in CASES),
        *(pytest.param(backend.values[0], "lstm", False, marks=backend.marks) for backend in BACKENDS),
        *(
            pytest.param(*case.values, False, marks=[*case.marks, pytest.mark.slow])
            for case in CASES
            if case.values[1] != "lstm"
        ),
    ],
)
def test_operator_passes_opcheck(backend, cell, keep):
    flat, _ = problem(cell, 1, 2, 2, 8, device=DEVICE[backend])
    weight_ih, weight_hh, bias, _ = (
        None if t is None else t.detach() for t in fused.pack(weights_of(flat, cell), cell)
    )
    tensors = [t.requires_grad_() for t in (flat[0].detach(), weight_ih, weight_hh, bias)]
    torch.library.opcheck(fused.scan2d, (*tensors, None, cell, ALL, backend, keep))


@pytest.mark.parametrize("backend", [BACKENDS[0]])
def test_one_dimension(backend):
    """`RNN1d`, which has one axis, with two layers and long sequences."""
    torch.manual_seed(0)
    layer = RNN1d(16, 8, num_layers=2)
    x, upstream = torch.randn(2, 16, 16, 16, requires_grad=True), torch.randn(2, 16, 16, 16)
    twin = copy.deepcopy(layer).double()
    y, expected = layer(x), twin(x.double())
    actual = [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]
    exact = [expected.detach(), *torch.autograd.grad(expected, [x, *twin.parameters()], upstream.double())]
    assert max(errors(actual, exact)) < 1e-6


def test_as_exact_as_torchs_lstm():
    """With equal weights, the error against float64 is at most twice that of torch's own kernel."""
    torch.manual_seed(0)
    theirs = nn.LSTM(24, 48, bidirectional=True, batch_first=True)
    layer = RNN(24, 48)
    layer.load_state_dict(theirs.state_dict())
    x = torch.randn(20, 32, 24)
    exact = copy.deepcopy(theirs).double()(x.double())[0]
    ours, torchs = layer(x), theirs(x)[0]
    assert (ours.double() - exact).norm() < max(2 * (torchs.double() - exact).norm(), 1e-6 * exact.norm())
