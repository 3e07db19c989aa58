"""The comparison of contenders: limits of the errors, turns, and ratios."""

import pytest
import torch
from torch import nn

from sequencer.measure import benchmarks, contest
from sequencer.measure.benchmarks import Settings, layer_bytes
from sequencer.measure.contenders import Contender, layer_contenders
from sequencer.measure.contest import Case, Result


def case(dtype: torch.dtype = torch.float32) -> Case:
    return Case(torch.randn(1, 3, 3, 8, requires_grad=True), torch.randn(1, 3, 3, 8), dtype)


@pytest.mark.parametrize(
    ("dtype", "timm", "ours", "accepted"),
    [
        (torch.float32, 1e-7, 0.9e-6, True),
        (torch.float32, 1e-7, 1.1e-6, False),
        (torch.float32, 1e-5, 2.9e-5, True),  # three times the error of timm's
        (torch.float32, 1e-5, 3.1e-5, False),
        (torch.float32, 1e-7, float("nan"), False),
        (torch.bfloat16, 1e-7, 1.9e-2, True),
        (torch.bfloat16, 1e-7, 2.1e-2, False),
    ],
)
def test_limits(monkeypatch, dtype, timm, ours, accepted):
    errors = {"timm": timm, "lstm, torch": ours, "resnet50": None}
    monkeypatch.setattr(contest, "relative_error", lambda contender, case: errors[contender.name])
    contenders = [Contender(name, nn.Identity()) for name in errors]
    if accepted:
        assert contest.check_outputs(contenders, case(dtype)) == errors
    else:
        with pytest.raises(RuntimeError, match="outputs or gradients are wrong: lstm, torch by"):
            contest.check_outputs(contenders, case(dtype))


@pytest.mark.parametrize("name", ["fc.bias", "rnn_v.weight_ih_l0"])
def test_every_gradient_is_compared(name):
    """A gradient that is doubled has a relative error of 1; the output is right."""
    (*_, contender, _) = layer_contenders(8, 2, ["torch"], [], False, torch.device("cpu"))
    assert contest.relative_error(contender, case()) < 1e-6
    contender.module.get_parameter(name).register_hook(lambda grad: 2 * grad)
    assert contest.relative_error(contender, case()) == pytest.approx(1, rel=1e-3)


class Recorded(nn.Module):
    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(self.name)
        return x


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_contenders_take_turns(mode):
    calls: list[str] = []
    contenders = [Contender(name, Recorded(name, calls)) for name in ("a", "b")]
    results = contest.measure(contenders, case(), mode, rounds=3)
    assert [(result.contender, len(result.seconds)) for result in results] == [("a", 3), ("b", 3)]
    assert calls[-6:] == ["a", "b"] * 3
    assert len(calls) > 6  # the warm-up


def test_ratios(monkeypatch):
    """1000 operations at 100 a second take 10 s, 120 bytes at 10 a second 12 s."""
    results = [Result("timm", "train", [30.0] * 3, 1, 1000), Result("ours", "train", [20.0] * 3, 1, 1000)]
    monkeypatch.setattr(benchmarks, "measure", lambda *args: results)
    monkeypatch.setattr(benchmarks, "check_outputs", lambda *args: {"timm": 1e-7, "ours": 1e-8})
    settings = Settings(torch.device("cpu"), torch.float32, ["train"], 3, flop_rate=100, byte_rate=10)
    for least_bytes, floor in (({"train": 120}, 12), ({}, 10)):
        first, second = benchmarks.compare(settings, "title", {"batch": 1}, [], case(), least_bytes).records
        assert (first["speed_over_first"], second["speed_over_first"]) == (1, 1.5)
        assert (first["share_of_floor"], second["share_of_floor"]) == (floor / 30, floor / 20)
        assert (second["batch"], second["median_s"], second["relative_error"]) == (1, 20, 1e-8)


def test_bytes_of_a_layer():
    """For each of the 4 D hidden units of a token a write and a read, in training also of four gates and a cell."""
    B, H, W, C, D = 2, 3, 5, 7, 11
    hidden = 4 * D
    inference = layer_bytes(B, H, W, C, D, "inference", torch.float32)
    assert inference == 4 * B * H * W * (C + C + 2 * hidden)
    training = layer_bytes(B, H, W, C, D, "train", torch.bfloat16)
    gates_and_cells = 2 * (4 + 1) * hidden
    assert training == 2 * B * H * W * (5 * C + gates_and_cells + 4 * hidden)


def test_a_peer_that_does_not_compile_is_left_out():
    """Its failure is told, and the others are measured."""

    class Uncompilable(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("no rule for this operator\nfrom user code")

    contenders = layer_contenders(8, 2, ["torch"], ["timm"], False, torch.device("cpu"))
    broken = Contender("timm, compiled", nn.Identity(), exact=contenders[0].exact)
    broken.compiled, broken.module = True, Uncompilable()
    settings = Settings(torch.device("cpu"), torch.float32, ["train"], 2, 1e9, 1e9)
    found = benchmarks.compare(settings, "layers", {"batch": 1}, [*contenders, broken], case(), {})
    assert found.failures == {"timm, compiled": "no rule for this operator"}
    assert [record["contender"] for record in found.records] == [contender.name for contender in contenders]
