"""Linear layers by each matrix product, and the choice of products, which is measured once."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

from sequencer.layers import RNN2d
from sequencer.layers.blocks import Mlp
from sequencer.layers.linear import Linear
from sequencer.ops import configure, explain, products
from sequencer.ops.products import Choice, linear

ONEDNN = Choice("onednn", "onednn", "onednn")
HAVE_ONEDNN = "onednn" in products.candidates(torch.float32)
NEEDS_ONEDNN = pytest.mark.skipif(not HAVE_ONEDNN, reason="torch has no oneDNN product")


@pytest.fixture
def chosen(monkeypatch):
    """`chosen(choice)` makes every product in float32 and bfloat16 one of `choice`, however small."""

    def choose(choice: Choice) -> None:
        wide = products.DEFAULT
        monkeypatch.setattr(products, "_choice", lambda dtype, _: wide if dtype == torch.float64 else choice)
        monkeypatch.setattr(products, "SMALLEST", 1)

    return choose


@pytest.fixture
def measurements(monkeypatch, tmp_path):
    """An empty cache folder, and a list with the dtype of every measurement, each of which has another result."""
    made = []
    results = [ONEDNN, Choice("torch", "onednn", "torch")]

    def measure(names, dtype):
        made.append(dtype)
        return results[(len(made) - 1) % 2]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(products, "_measure", measure)
    monkeypatch.setattr(products, "candidates", lambda dtype: ["torch", "onednn"])
    monkeypatch.setattr(products, "_choice", products._choice.__wrapped__)
    return made


def results(function, tensors, upstream):
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t is not None], upstream)]


def draw(shape, channels, dtype, bias=True):
    torch.manual_seed(0)
    tensors = [torch.randn(*shape, 24), torch.randn(channels, 24), torch.randn(channels) if bias else None]
    upstream = torch.randn(*shape, channels)
    return [t if t is None else t.to(dtype).requires_grad_() for t in tensors], upstream.to(dtype)


CASES = [
    pytest.param(torch.float32, ONEDNN, 1e-6, marks=NEEDS_ONEDNN),
    pytest.param(torch.float32, Choice("torch", "onednn", "torch"), 1e-6, marks=NEEDS_ONEDNN),
    (torch.bfloat16, Choice("float32", "float32", "float32"), 2e-2),
    (torch.bfloat16, Choice("float32", "torch", "torch"), 2e-2),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "channels"), [((5, 7), 40), ((1,), 1), ((2, 3, 4), 33), ((0, 3), 8)])
@pytest.mark.parametrize(("dtype", "choice", "tolerance"), CASES)
def test_linear_equals_torch_in_float64(chosen, dtype, choice, tolerance, shape, channels, bias):
    chosen(choice)
    tensors, upstream = draw(shape, channels, dtype, bias)
    actual = results(linear, tensors, upstream)
    exact = results(
        F.linear, [t if t is None else t.detach().double().requires_grad_() for t in tensors], upstream.double()
    )
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == dtype
        assert a.shape == e.shape
        assert (a.double() - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize("layout", ["expanded gradient", "strided input", "strided weight"])
@NEEDS_ONEDNN
def test_any_strides(chosen, layout):
    chosen(ONEDNN)
    (x, weight, bias), upstream = draw((6, 5), 10, torch.float32)
    if layout == "expanded gradient":
        upstream = torch.ones(()).expand(6, 5, 10)
    elif layout == "strided input":
        x = torch.randn(6, 24, 5).mT.requires_grad_()
    else:
        weight = torch.randn(24, 10).t().requires_grad_()
    torch.testing.assert_close(
        results(linear, (x, weight, bias), upstream), results(F.linear, (x, weight, bias), upstream)
    )


@NEEDS_ONEDNN
def test_only_the_gradients_that_are_needed(chosen):
    chosen(ONEDNN)
    (x, weight, bias), upstream = draw((6, 5), 10, torch.float32)
    frozen = weight.detach()
    linear(x, frozen, bias).backward(upstream)
    assert x.grad is not None
    assert frozen.grad is None
    assert not linear(x.detach(), frozen, bias.detach()).requires_grad


@NEEDS_ONEDNN
def test_higher_derivatives(chosen):
    chosen(ONEDNN)
    tensors, _ = draw((3, 2), 5, torch.float32)

    def penalty(function, tensors):
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    exact = penalty(F.linear, [tensor.detach().double().requires_grad_() for tensor in tensors])
    for actual, expected in zip(penalty(linear, tensors), exact, strict=True):
        assert (actual - expected).norm() < 1e-6 * expected.norm()


@NEEDS_ONEDNN
def test_transforms_and_other_devices_take_torchs_product(chosen):
    chosen(ONEDNN)
    x, weight, bias = (t.detach() for t in draw((3,), 5, torch.float32)[0])
    each = vmap(grad(lambda x: linear(x, weight, bias).square().sum()))(x)
    torch.testing.assert_close(each, 2 * F.linear(x, weight, bias) @ weight)
    assert Linear(24, 5, device="meta")(x.to("meta")).shape == (3, 5)


@pytest.mark.parametrize("choice", [products.DEFAULT, pytest.param(ONEDNN, marks=NEEDS_ONEDNN)])
def test_autocast(chosen, choice):
    chosen(choice)
    layer, x = Linear(24, 5), torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=1e-2, atol=1e-2)
        y.float().sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        assert layer.double()(x.double()).dtype == torch.float64


@NEEDS_ONEDNN
def test_every_product_is_counted_and_repeatable(chosen):
    chosen(ONEDNN)
    (x, weight, bias), upstream = draw((4, 8), 16, torch.float32)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias).backward(upstream)
    assert counter.get_total_flops() == 3 * 2 * 32 * 24 * 16
    first, second = (results(linear, (x, weight, bias), upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("cell", ["lstm", "gru", "indylstm"])
@pytest.mark.parametrize("choice", [ONEDNN, Choice("torch", "torch", "onednn")])
@NEEDS_ONEDNN
def test_recurrences_by_each_product(chosen, cell, choice):
    torch.manual_seed(0)
    layer, x = RNN2d(16, 8, cell), torch.randn(3, 5, 7, 16, requires_grad=True)
    upstream = torch.randn(3, 5, 7, 16)
    tensors = [x, *layer.parameters()]
    expected = results(lambda *_: layer(x), tensors, upstream)
    chosen(choice)
    torch.testing.assert_close(results(lambda *_: layer(x), tensors, upstream), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected[0], rtol=1e-4, atol=1e-5)


def test_the_mlp_has_the_keys_of_timms():
    from timm.layers import Mlp as Theirs

    theirs, ours = Theirs(8, 24), Mlp(8, 24)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours.fc1, nn.Linear)


# The choice.


def test_the_choice_is_measured_once(measurements, tmp_path):
    first = products.choice(torch.float32)
    assert [products.choice(torch.float32) for _ in range(3)] == [first] * 3
    assert measurements == [torch.float32]
    (path,) = tmp_path.glob("sequencer/products-*.json")
    kept = json.loads(path.read_text())
    assert kept["choice"] == first._asdict()
    assert kept["torch"] == torch.__version__
    assert kept["threads"] == torch.get_num_threads()


def test_another_number_of_threads_or_dtype_has_its_own_choice(measurements):
    for dtype, threads in ((torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1)):
        products._choice(dtype, threads)
        products._choice(dtype, threads)
    assert measurements == [torch.float32, torch.float32, torch.bfloat16]


def test_all_processes_take_the_choice_that_is_written_first(measurements, monkeypatch):
    """A process that has measured something else while another one wrote its choice gives up its own."""
    measure = products._measure

    def measure_twice(names, dtype):
        monkeypatch.setattr(products, "_measure", measure)
        winner = products.choice(dtype)
        assert winner == ONEDNN
        return measure(names, dtype)

    monkeypatch.setattr(products, "_measure", measure_twice)
    assert products.choice(torch.float32) == ONEDNN
    assert len(measurements) == 2


def test_without_a_cache_folder_nothing_is_measured(measurements, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert products.choice(torch.float32) == products.DEFAULT
    assert measurements == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"choice": {"outputs": "onednn"}}', '{"choice": 5}'])
def test_a_damaged_choice_is_torchs(measurements, tmp_path, content):
    products.choice(torch.float32)
    (path,) = tmp_path.glob("sequencer/products-*.json")
    path.write_text(content)
    assert products.choice(torch.float32) == products.DEFAULT


def test_a_choice_of_a_product_that_is_absent_is_torchs(measurements, monkeypatch):
    assert products.choice(torch.float32) == ONEDNN
    monkeypatch.setattr(products, "candidates", lambda dtype: ["torch", "float32"])
    assert products.choice(torch.float32) == products.DEFAULT


def test_measuring_leaves_no_trace():
    state = torch.get_rng_state()
    names = products.candidates(torch.float32)
    with FlopCounterMode(display=False) as counter:
        assert set(products._measure(names, torch.float32)) <= set(names)
    assert counter.get_total_flops() == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_explain_names_the_products(chosen, monkeypatch):
    configure("auto")
    if explain().backend != "fused":
        pytest.skip("there is no kernel")
    chosen(products.DEFAULT)
    assert explain().reason.endswith("; matrix products by torch")
    chosen(Choice("onednn", "torch", "onednn"))
    assert explain().reason.endswith(
        "; matrix products by oneDNN (outputs), torch (gradients of inputs), oneDNN (gradients of weights)"
    )
    assert "products" not in explain(backend="reference").reason


# In a process of its own, since the run-time type checks of the tests cannot be compiled.
TRACED_AND_ABSENT = """
import torch
from torch.nn.functional import linear
from sequencer.layers.linear import Linear
from sequencer.ops import products
products._choice = lambda dtype, threads: products.Choice("onednn", "onednn", "onednn")
products.SMALLEST = 1
layer, x = Linear(24, 5), torch.randn(3, 24)
compiled = torch.compile(layer, backend="eager", fullgraph=True)
assert torch.equal(compiled(x), linear(x, layer.weight, layer.bias))
exported = torch.export.export(layer, (x,))
assert not [node for node in exported.graph.nodes if "mkldnn" in str(node.target)]

class Without:
    pass

torch.ops.mkldnn = Without()
assert products.candidates(torch.float32) == ["torch"]
"""


def test_traced_graphs_and_torch_without_the_operator():
    subprocess.run([sys.executable, "-c", TRACED_AND_ABSENT], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_inputs_of_the_mlp_are_computed_in_parts(monkeypatch, dtype):
    monkeypatch.setattr("sequencer.layers.blocks.HIDDEN_BYTES", 4 * 24 * 5)  # 5 rows in float32, 10 in bfloat16
    layer = Mlp(8, 24).to(dtype).eval()
    x = torch.randn(3, 7, 4, 8, dtype=dtype)
    sizes = []
    layer.fc1.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[:-1].numel()))
    whole = layer(x)
    assert sizes == [84]
    with torch.no_grad():
        parts = layer(x)
        assert layer(x[:1, :1]).shape == (1, 1, 4, 8)
    rows = 5 if dtype == torch.float32 else 10
    assert sizes[1:] == [rows] * (84 // rows) + [84 % rows, 4]
    torch.testing.assert_close(parts, whole.detach())
