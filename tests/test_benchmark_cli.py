"""scripts/benchmark.py: the gate, what it prints and writes, and how it ends. Speeds themselves are not tested."""

import json
import time

import pytest
import torch

from conf import request
from sequencer.measure import contest as benchmark
from sequencer.ops import bilstm2d, triton_kernels


@pytest.fixture
def script(load_script, monkeypatch):
    """The script with shapes that take no time."""
    script = load_script("benchmark")
    monkeypatch.setattr(script, "SHAPES", {"small": (4, 16, 8), "smaller": (3, 8, 8)})
    monkeypatch.setattr(script, "GROWTH", {"batch": (1, 2), "hidden size": (8,)})
    monkeypatch.setattr(benchmark, "ceilings", lambda device, dtype: (1e11, 1e10))
    return script


def test_layers(script, tmp_path, capsys):
    arguments = ["ops", "--device", "cpu", "--rounds", "2", "--batch", "1", "2", "--output", "found"]
    assert script.main([*arguments, "--peer", "timm", "packed", "--backend", "torch", "reference"]) == 0
    printed = capsys.readouterr().out
    assert "BiLSTM2D, small: 4 x 4 tokens, C 16, D 8; batch 1, float32" in printed
    assert "written to found" in printed
    written = json.loads((tmp_path / "found" / "benchmark.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    contenders = ["timm", "timm, packed", "lstm, torch", "lstm, reference", "lstm, torch, recompute", "indylstm, torch"]
    assert [r["contender"] for r in written["results"]] == 2 * 2 * 2 * contenders
    for record in written["results"]:
        assert record["relative_error"] < 1e-6
        assert 0 < record["p20_s"] <= record["median_s"] <= record["p80_s"]
        tokens, D, C = record["batch"] * record["H"] * record["W"], record["D"], record["C"]
        recurrent = 4 * D if record["contender"].startswith("indylstm") else 4 * D * D
        products = 2 * tokens * (4 * (4 * D * C + recurrent) + 4 * D * C)
        if record["mode"] == "inference" and not record["contender"].startswith("indylstm"):
            assert record["flops"] == products


def test_whole_models(script, tmp_path, capsys):
    arguments = ["model", "--device", "cpu", "--rounds", "2", "--batch", "1", "--img-size", "56", "--output", "found"]
    assert script.main([*arguments, "--peer", "timm", "test_convnext", "--mode", "inference"]) == 0
    results = json.loads((tmp_path / "found" / "benchmark.json").read_text())["results"]
    assert results[0]["contender"] == "timm"
    assert results[1]["contender"] == "test_convnext"
    assert results[1]["relative_error"] is results[1]["share_of_floor"] is None
    assert all(r["relative_error"] < 1e-5 and r["contender"].startswith("sequencer2d_s, ") for r in results[2:])
    assert [r["speed_over_first"] for r in results] == [results[0]["median_s"] / r["median_s"] for r in results]


def test_growth(script, tmp_path):
    assert script.main(["growth", "--device", "cpu", "--rounds", "2", "--mode", "inference", "--output", "found"]) == 0
    results = json.loads((tmp_path / "found" / "benchmark.json").read_text())["results"]
    assert {(r["quantity"], r["value"]) for r in results} == {("batch", 1), ("batch", 2), ("hidden size", 8)}
    assert (tmp_path / "found" / "growth.png").stat().st_size > 10_000


@pytest.mark.slow
def test_exports(script, tmp_path, capsys):
    assert script.main(["export", "--rounds", "2", "--img-size", "28", "--batch", "2", "--output", "found"]) == 0
    printed = capsys.readouterr().out
    assert "36 LSTM" in printed
    records = {r["contender"]: r for r in json.loads((tmp_path / "found" / "benchmark.json").read_text())["results"]}
    assert list(records) == ["timm", "sequencer2d_s, fused", "sequencer2d_s, torch", "ONNX", "timm, ONNX"]
    assert "Slice" not in records["ONNX"]["nodes"]
    assert records["timm, ONNX"]["nodes"]["Slice"] > 700
    assert all(record["relative_error"] < 1e-5 for record in records.values())
    assert records["ONNX"]["flops"] == records["timm, ONNX"]["flops"] == records["sequencer2d_s, fused"]["flops"]
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["benchmark.json"]


@pytest.mark.parametrize("wrong", ["weight_hh_l0", "bias_ih_l0_reverse"])
def test_no_speed_without_equal_outputs(script, tmp_path, monkeypatch, capsys, wrong):
    """The gate sees 1e-4 on a single tensor."""
    layer_contenders = benchmark.layer_contenders

    def altered(*args):
        contenders = layer_contenders(*args)
        ours = next(c for c in contenders if c.name == "lstm, torch")
        with torch.no_grad():
            getattr(ours.module.rnn_h, wrong).mul_(1 + 1e-4)
        return contenders

    monkeypatch.setattr(benchmark, "layer_contenders", altered)
    assert script.main(["ops", "--device", "cpu", "--rounds", "2", "--backend", "torch", "--output", "found"]) == 1
    printed = capsys.readouterr()
    assert "no speed is reported, outputs or gradients are off: lstm, torch by " in printed.err
    assert "median" not in printed.out
    assert not (tmp_path / "found" / "benchmark.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--peer", "resnet50"], "--peer resnet50: for ops there are timm and packed"),
        (["model", "--peer", "resnet5000"], "--peer resnet5000: timm has no such model"),
        (["model", "--model", "resnet50"], "--model resnet50: there are sequencer2d_s, sequencer2d_m, sequencer2d_l"),
        (["model", "--img-size", "220"], "--img-size 220"),
        (["ops", "--backend", "cudnn"], "--backend cudnn: unknown backend 'cudnn'; there are auto, triton, "),
        (["ops", "--backend", "triton", "--device", "cpu"], "--backend triton: the triton backend cannot serve lstm: "),
        (["ops", "--output", "a_file/below"], "--output a_file/below cannot be written"),
        (["export", "--dtype", "bfloat16"], "export is measured on the CPU in float32 and in inference"),
    ],
)
def test_wrong_requests(script, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: False)
    bilstm2d._choose.cache_clear()
    (tmp_path / "a_file").touch()
    assert script.main(["--rounds", "2", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "invalid choice: 'train'"),
        (["ops", "--batch", "0"], "0 is less than 1"),
        (["ops", "--rounds", "many"], "many is not an integer"),
    ],
)
def test_wrong_arguments(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_whether_the_loader_keeps_up(load_script, capsys):
    script = load_script("benchmark")
    wanted = ["data", "--rounds", "2", "data=digits", "data.num_workers=0", "--device", "cpu"]
    assert script.main(wanted) == 0
    rates = [
        float(line.split()[1].replace(",", "")) for line in capsys.readouterr().out.splitlines() if "images/s" in line
    ]
    assert len(rates) == 2
    assert all(rate > 10 for rate in rates)


def test_a_slow_loader_is_found_out(load_script, capsys, monkeypatch):
    from sequencer.data.memory import MemoryTrainSet

    served = MemoryTrainSet.__getitems__
    monkeypatch.setattr(MemoryTrainSet, "__getitems__", lambda self, keys: time.sleep(1) or served(self, keys))
    script = load_script("benchmark")
    assert script.main(["data", "--rounds", "2", "data=digits", "data.num_workers=0", "--device", "cpu"]) == 0
    assert "starves the model" in capsys.readouterr().out


def test_the_loop_beside_a_bare_one(load_script, capsys, monkeypatch):
    compose = request.compose
    monkeypatch.setattr(
        request, "compose", lambda overrides: compose([*overrides, "data.batch_size=2", "trainer.max_epochs=1"])
    )
    assert load_script("benchmark").main(["loop", "--rounds", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Lightning over the bare loop: " in printed
    assert "(median of 2 pairs)" in printed


def test_only_data_takes_a_run(load_script, capsys):
    assert load_script("benchmark").main(["ops", "data=cifar10"]) == 2
    assert "only benchmark.py data takes the values of a run" in capsys.readouterr().err
