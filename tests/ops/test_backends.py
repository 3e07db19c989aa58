"""The choice of backend, torch's kernels against the reference, and the scans over a token map."""

import logging

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sequencer.layers import RNN, RNN2d
from sequencer.ops import CELLS, backends, configure, cpu, cpu_kernel, explain, rnn1d, rnn2d, triton_kernels
from sequencer.ops.torch_rnn import FUNCTIONS

TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


@pytest.fixture
def settings():
    """Restores the default settings after a test that calls `configure`."""
    yield
    configure()


@pytest.fixture
def forget_kernel():
    """Discards what the process knows about the CPU kernel, before and after a test."""
    caches = [cpu_kernel.library, cpu.unavailable, backends._warn_once, backends._choose]
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_choice_of_backend():
    fast = "torch" if cpu.unavailable() else "fused"
    assert {cell: explain(cell).backend for cell in CELLS} == {
        "lstm": fast,
        "gru": fast,
        "rnn": fast,
        "rnn_relu": fast,
        **dict.fromkeys(["peephole_lstm", "indylstm", "lstm1997"], "reference" if cpu.unavailable() else "fused"),
    }
    assert explain("lstm", dtype=torch.float64).backend == "torch"
    assert explain("lstm", device="meta").backend == "torch"
    assert explain("lstm", backend="reference").backend == "reference"
    assert "serves lstm, indylstm, gru, rnn and rnn_relu" in explain("lstm1997").reason
    assert explain("gru", device="cuda").backend == "torch"
    assert "triton: its kernels of gru are not known to be faster" in explain("gru", device="cuda").reason
    with pytest.raises(ValueError, match="unknown cell 'lstmm'; there are lstm, gru"):
        explain("lstmm")
    with pytest.raises(ValueError, match="unknown backend 'cudnn'; there are auto, triton"):
        explain("lstm", backend="cudnn")
    with pytest.raises(ValueError, match="the torch backend cannot serve indylstm: it has no indylstm cell"):
        explain("indylstm", backend="torch")


@pytest.mark.skipif(triton_kernels.unavailable() is not None, reason=f"{triton_kernels.unavailable()}")
def test_triton_supports_its_range_of_hidden_sizes(settings):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size, supported in ((7, False), (8, True), (256, True), (257, False)):
        assert (explain("lstm", size, device=device).backend == "triton") == (supported and device == "cuda")
        configure(backend="triton")
        assert (explain("lstm", size, device=device).backend == "triton") == supported
        configure()
    configure(backend="triton")
    layer, x = RNN(3, 300).to(device), torch.randn(1, 2, 3, device=device)
    assert layer(x).shape == (1, 2, 600)  # computed by another backend


def test_preferred_backend(settings):
    configure(backend="torch")
    assert explain("lstm").backend == "torch"
    assert explain("indylstm").backend != "torch"
    configure(backend="reference")
    assert explain("gru").backend == "reference"
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        configure(backend="fast")
    assert explain("gru").backend == "reference"


def test_environment_sets_the_default(settings, monkeypatch):
    monkeypatch.setenv("SEQUENCER_BACKEND", "torch")
    assert explain("lstm").backend == "torch"
    configure(backend="reference")
    assert explain("lstm").backend == "reference"
    configure()
    monkeypatch.setenv("SEQUENCER_BACKEND", "trition")
    with pytest.raises(ValueError, match="unknown backend 'trition'"):
        explain("lstm")
    with pytest.raises(ValueError, match="unknown backend 'trition'"):
        RNN(3, 2)(torch.zeros(1, 2, 3))


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no C++ compiler on the PATH"), ("false", "the C++ compiler failed: Command ")],
)
def test_torchs_kernels_are_used_without_a_compiler(forget_kernel, compiler, reason, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for size in (4, 4, 5):
        assert RNN2d(8, size)(torch.randn(1, 2, 3, 8)).isfinite().all()
    assert explain().backend == "torch"
    assert f"fused: {reason}" in explain().reason
    (record,) = [record for record in caplog.records if record.name == "sequencer"]  # the user is warned once
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"recurrences run on torch's slower kernels: {reason}")
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_multiplications_are_all_counted(backend, settings):
    """A forward pass of sequencer2d_s at 224 px has 8.33 billion multiplications.

    The backward pass has twice as many, less those of the gradient of the image, which is not computed.
    """
    configure(backend=backend)
    model = timm.create_model("sequencer2d_s")
    image = torch.randn(1, 3, 224, 224)
    with FlopCounterMode(display=False) as forward:
        loss = model(image).sum()
    assert forward.get_total_flops() / 2e9 == pytest.approx(8.334, abs=1e-3)
    if backend == "reference":
        return  # its backward pass skips products with the initial state, which is zero
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    stem = 192 * 32 * 32 * 3 * 7 * 7
    assert backward.get_total_flops() / 2 == pytest.approx(2 * forward.get_total_flops() / 2 - stem, rel=1e-6)


def outputs_and_gradients(function, inputs, upstream):
    """Returns the output, then the gradient of `<output, upstream>` with respect to each input."""
    outputs = function()
    return [outputs, *torch.autograd.grad(outputs, inputs, upstream)]


@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 5), (3, 1), (3, 5)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", FUNCTIONS)
def test_torch_equals_reference(cell, num_layers, bidirectional, dtype, n, t):
    torch.manual_seed(0)
    layer = RNN(5, 4, cell, num_layers, bidirectional).to(dtype)
    x = torch.randn(n, t, 5, dtype=dtype, requires_grad=True)
    upstream = torch.randn(n, t, layer.output_size, dtype=dtype)
    inputs = [x, *layer.parameters()]
    expected, actual = (
        outputs_and_gradients(lambda backend=backend: rnn1d(x, layer.weights(), cell, backend), inputs, upstream)
        for backend in ("reference", "torch")
    )
    assert actual[0].dtype == dtype
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("cell", "torch_module"),
    [
        ("lstm", nn.LSTM),
        ("gru", nn.GRU),
        ("rnn", nn.RNN),
        ("rnn_relu", lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs)),
    ],
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_state_dicts_of_torchs_modules_load(cell, torch_module, bidirectional):
    torch.manual_seed(0)
    module = torch_module(5, 4, num_layers=2, bidirectional=bidirectional, batch_first=True)
    layer = RNN(5, 4, cell, num_layers=2, bidirectional=bidirectional)
    assert list(layer.state_dict()) == list(module.state_dict())
    layer.load_state_dict(module.state_dict())
    x = torch.randn(3, 6, 5)
    torch.testing.assert_close(layer(x), module(x)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell):
    """Outputs are bfloat16 and close to those of float32; gradients of the parameters are float32."""
    torch.manual_seed(0)
    layer, x = RNN(8, 6, cell, num_layers=2), torch.randn(3, 7, 8)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = layer(x)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), exact, rtol=0, atol=0.02)
    outputs.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_autocast_leaves_float64(cell):
    """As in torch, whose autocast converts narrower dtypes alone."""
    torch.manual_seed(0)
    layer, x = RNN(8, 6, cell).double(), torch.randn(3, 7, 8, dtype=torch.float64)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), exact)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 0, 4), (2, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("cell", ["lstm", "gru", "lstm1997"])
def test_a_map_without_tokens(cell, size):
    _, rows, columns = size
    with pytest.raises(ValueError, match=f"at least one step: the token map has {rows} rows and {columns} columns"):
        RNN2d(8, 4, cell)(torch.ones(*size, 8))


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_hh_l0_reverse"])
@pytest.mark.parametrize("gradients", [True, False])
def test_weights_on_another_device(gradients, name):
    """The kernels would read memory that is not there."""
    layer = RNN2d(8, 4).eval()
    setattr(layer.rnn_h, name, nn.Parameter(getattr(layer.rnn_h, name).to("meta")))
    with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match=r"are on meta, its inputs on cpu"):
        layer(torch.ones(2, 3, 4, 8))


@pytest.mark.parametrize(
    ("cell", "kind", "shape"),
    [("lstm", "bias", (4000,)), ("lstm", "bias", (8,)), ("indylstm", "bias", (4000,)), ("lstm", "weight_hh", (4, 4))],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_weights_that_do_not_fit_together(gradients, cell, kind, shape):
    """The kernels would read memory that is not theirs."""
    layer = RNN2d(8, 4, cell).eval()
    for rnn in (layer.rnn_v, layer.rnn_h):
        for name in [name for name, _ in rnn.named_parameters() if name.startswith(kind)]:
            setattr(rnn, name, nn.Parameter(torch.zeros(shape)))
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match="weights of a recurrence that do not fit"):
        rnn2d(torch.ones(2, 3, 4, 8), layer.rnn_v.weights(), layer.rnn_h.weights(), cell, backend="fused")


@pytest.mark.parametrize("cell", CELLS)
def test_weights_in_bfloat16(cell):
    torch.manual_seed(0)
    layer, x = RNN(8, 6, cell), torch.randn(3, 7, 8)
    exact = layer(x)
    outputs = layer.bfloat16()(x.bfloat16())
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_in_eval_mode(cell):
    layer, x = RNN(3, 2, cell).eval(), torch.randn(2, 4, 3, requires_grad=True)
    layer(x).square().sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in (x, *layer.parameters()))


def by_rows_and_columns(x, vertical, horizontal, cell, union):
    """Computes `rnn2d` one column and one row at a time, by `rnn1d`."""
    B, H, W, _ = x.shape
    size = next(layers[-1][0].bias_ih.numel() for layers in (vertical, horizontal) if layers) // CELLS[cell].gates
    size *= len((vertical or horizontal)[0])
    v, h = x.new_full((B, H, W, size), torch.nan), x.new_full((B, H, W, size), torch.nan)
    for b in range(B):
        if vertical:
            for column in range(W):
                v[b, :, column] = rnn1d(x[b, :, column][None], vertical, cell, "reference")[0]
        if horizontal:
            for row in range(H):
                h[b, row] = rnn1d(x[b, row][None], horizontal, cell, "reference")[0]
    if vertical and horizontal:
        return v + h if union == "add" else torch.cat([v, h], -1)
    return v if vertical else h


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("union", ["cat", "add", "vertical", "horizontal"])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn2d_scans_columns_and_rows(cell, union, bidirectional):
    torch.manual_seed(0)
    vertical, horizontal = (RNN(3, 2, cell, bidirectional=bidirectional).double().weights() for _ in range(2))
    if union == "vertical":
        horizontal = None
    if union == "horizontal":
        vertical = None
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = by_rows_and_columns(x, vertical, horizontal, cell, union)
        for backend in {None, "reference"}:
            actual = rnn2d(x, vertical, horizontal, cell, union, backend)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
