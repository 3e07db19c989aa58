"""scripts/benchmark.py: the check of the outputs, tables, files and exit codes. Speeds are not tested."""

import json

import pytest
import torch

from sequencer.config import compose
from sequencer.measure import benchmarks, choose_backends, correctness
from sequencer.measure.machine_code import MachineCode
from sequencer.ops import backends, triton_kernels


@pytest.fixture
def script(load_script, monkeypatch):
    """The script with small shapes."""
    monkeypatch.setattr(benchmarks, "SHAPES", {"small": (4, 16, 8), "smaller": (3, 8, 8)})
    monkeypatch.setattr(benchmarks, "GROWTH", {"batch": (1, 2), "hidden size": (8,)})
    monkeypatch.setattr("sequencer.measure.peak_rates", lambda device, dtype: (1e11, 1e10))
    return load_script("benchmark")


def test_layers(script, tmp_path, capsys):
    arguments = ["ops", "--device", "cpu", "--rounds", "2", "--batch", "1", "2", "--output", "found"]
    assert script.main([*arguments, "--peer", "timm", "packed", "--backend", "torch", "reference"]) == 0
    printed = capsys.readouterr().out
    assert "BiLSTM2D, small: 4 x 4 tokens, C 16, D 8; batch 1, float32" in printed
    assert "written to found" in printed
    written = json.loads((tmp_path / "found" / "benchmark.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    contenders = ["timm", "timm, packed", "lstm, torch", "lstm, reference", "lstm, torch, recompute", "indylstm, torch"]
    contenders += ["gru, torch", "gru, reference"]
    assert [r["contender"] for r in written["results"]] == 2 * 2 * 2 * contenders
    for record in written["results"]:
        assert record["relative_error"] < 1e-6
        assert 0 < record["p20_s"] <= record["median_s"] <= record["p80_s"]
        tokens, D, C = record["batch"] * record["H"] * record["W"], record["D"], record["C"]
        gates = 3 if record["contender"].startswith("gru") else 4
        recurrent = 4 * D if record["contender"].startswith("indylstm") else gates * D * D
        products = 2 * tokens * (4 * (gates * D * C + recurrent) + 4 * D * C)
        if record["mode"] == "inference" and not record["contender"].startswith("indylstm"):
            assert record["flops"] == products


def test_whole_models(script, tmp_path, capsys):
    arguments = ["model", "--device", "cpu", "--rounds", "2", "--batch", "1", "--img-size", "42", "--output", "found"]
    assert (
        script.main(
            [*arguments, "--peer", "timm", "test_convnext", "packed", "--backend", "torch", "--mode", "inference"]
        )
        == 0
    )
    results = json.loads((tmp_path / "found" / "benchmark.json").read_text())["results"]
    assert results[0]["contender"] == "timm"
    assert results[1]["contender"] == "test_convnext"
    assert results[1]["relative_error"] is results[1]["share_of_floor"] is None
    assert results[2]["contender"] == "timm, packed"
    assert results[2]["relative_error"] < 1e-5
    assert all(r["relative_error"] < 1e-5 and r["contender"].startswith("sequencer2d_s, ") for r in results[3:])
    assert [r["speed_over_first"] for r in results] == [results[0]["median_s"] / r["median_s"] for r in results]


def test_growth(script, tmp_path):
    assert script.main(["growth", "--device", "cpu", "--rounds", "2", "--mode", "inference", "--output", "found"]) == 0
    results = json.loads((tmp_path / "found" / "benchmark.json").read_text())["results"]
    assert {(r["quantity"], r["value"]) for r in results} == {("batch", 1), ("batch", 2), ("hidden size", 8)}
    assert [r["contender"].partition(",")[0] for r in results] == 3 * ["timm", "lstm", "indylstm"]
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
    """A change of 1e-4 in a single tensor is an error."""
    layer_contenders = benchmarks.layer_contenders

    def altered(*args):
        contenders = layer_contenders(*args)
        ours = next(c for c in contenders if c.name == "lstm, torch")
        with torch.no_grad():
            getattr(ours.module.rnn_h, wrong).mul_(1 + 1e-4)
        return contenders

    monkeypatch.setattr(benchmarks, "layer_contenders", altered)
    assert script.main(["ops", "--device", "cpu", "--rounds", "2", "--backend", "torch", "--output", "found"]) == 1
    printed = capsys.readouterr()
    assert "no speed is reported, outputs or gradients are wrong: lstm, torch by " in printed.err
    assert "median" not in printed.out
    assert not (tmp_path / "found" / "benchmark.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--peer", "resnet5000"], "--peer resnet5000: timm has no such model"),
        (["model", "--model", "resnet50"], "--model resnet50: there are sequencer2d_s, sequencer2d_m, sequencer2d_l"),
        (["model", "--img-size", "13"], "--img-size 13"),
        (["ops", "--backend", "cudnn"], "--backend cudnn: unknown backend 'cudnn'; there are auto, triton, "),
        (["ops", "--backend", "triton", "--device", "cpu"], "--backend triton: the triton backend cannot serve lstm: "),
        (["ops", "--output", "a_file/below"], "a_file/below cannot be written"),
    ],
)
def test_wrong_requests(script, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: False)
    backends._choose.cache_clear()
    (tmp_path / "a_file").touch()
    assert script.main([*arguments, "--rounds", "2"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "invalid choice: 'train'"),
        (["ops", "--peer", "resnet50"], "invalid choice: 'resnet50'"),
        (["ops", "data=cifar10"], "unrecognized arguments: data=cifar10"),
        (["model", "--seconds", "3"], "unrecognized arguments: --seconds 3"),
        (["growth", "--batch", "1", "8"], "unrecognized arguments: 8"),
        (["export", "--dtype", "bfloat16"], "unrecognized arguments: --dtype bfloat16"),
        (["loop", "--peer", "x"], "unrecognized arguments: --peer x"),
        (["data", "--output", "x"], "unrecognized arguments: --output"),
        (["ops", "--batch", "0"], "0 is less than 1"),
        (["ops", "--rounds", "many"], "many is not an integer"),
        (["kernels", "--capability", "75"], "invalid choice: 75"),
        (["all", "--backend", "torch"], "unrecognized arguments: --backend torch"),
    ],
)
def test_wrong_arguments(script, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.endswith(f"{'' if arguments == ['train'] else arguments[0]} --help lists the arguments\n")
    assert len(error.splitlines()) == 2


@pytest.mark.parametrize(("loader", "verdict"), [(100.0, "starves the model"), (300.0, "keeps up with the model")])
def test_loader_and_model(script, capsys, monkeypatch, loader, verdict):
    monkeypatch.setattr("sequencer.measure.measure_loader", lambda config, seconds: (loader * seconds, 600.0))
    wanted = ["data", "data=digits", "--seconds", "3", "data.num_workers=0", "--device", "cpu", "data.batch_size=7"]
    assert script.main(wanted) == 0
    printed = capsys.readouterr().out
    assert "digits, 0 workers; sequencer2d_t_8, batches of 7" in printed
    assert f"loader {3 * loader:>12,.0f} images/s\nmodel           600 images/s" in printed
    assert f"the loader is {loader / 200:.2f} times as fast as the model: it {verdict}" in printed


def test_loop_beside_a_bare_one(script, capsys, monkeypatch):
    monkeypatch.setattr(script, "LOOPS", {"cpu": ("cifar10_cpu", 3)})
    small = ["data.batch_size=2", "model.kwargs={layers: [1], patch_sizes: [4], embed_dims: [8], hidden_sizes: [2]}"]
    monkeypatch.setattr(script, "compose", lambda overrides: compose([*overrides, *small]))
    assert script.main(["loop", "--rounds", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "cifar10_cpu: 3 steps per round, 2 rounds in turns" in printed
    assert "time of Lightning / time of the bare loop: " in printed
    assert "(median of 2 pairs)" in printed


@pytest.fixture
def small_script(script, monkeypatch):
    """The script with small shapes, images and runs, for all measurements of a device."""
    monkeypatch.setattr(script, "LOOPS", {"cpu": ("cifar10_cpu", 2)})
    small = ["data.batch_size=2", "model.kwargs={layers: [1], patch_sizes: [4], embed_dims: [8], hidden_sizes: [2]}"]
    monkeypatch.setattr(script, "compose", lambda overrides: compose([*overrides, *small]))
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)  # compiling takes minutes, and models seconds
    monkeypatch.setattr(
        "sequencer.measure.compare_models",
        lambda settings, name, size, *rest: benchmarks.compare_layers(settings, *rest),
    )
    monkeypatch.setattr(correctness, "HIDDEN_SIZES", (8,))
    monkeypatch.setattr(correctness, "MAPS", [(2, 2, 3)])
    return script


ALL = ["all", "--device", "cpu", "--rounds", "2", "--batch", "1", "--img-size", "28", "--dtype", "float32"]


def test_all_measurements(small_script, tmp_path, capsys):
    assert small_script.main([*ALL, "--output", "found"]) == 0
    printed = capsys.readouterr().out
    page = (tmp_path / "found" / "performance.md").read_text()
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["Summary", "Correctness", "ops, float32", "model, float32", "growth", "loop"]
    assert "correct: float32, " in printed
    assert "| ops, float32 | shape small, batch 1 | train | " in page
    assert "| model, float32 | shape small, batch 1 | inference | " in page
    assert "| growth | quantity hidden size, value 8, batch 8 | train | " in page
    assert page.count("timm, packed") == 2 * 2 * 2
    assert "time of Lightning / time of the bare loop: " in page
    assert (tmp_path / "found" / "ops_float32" / "benchmark.json").is_file()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (3.1e-4, ": outputs or gradients are wrong by 3.1e-04; limit 3.0e-04"),  # three times that of the reference
        (2.9e-4, " differs from pass to pass"),
    ],
)
def test_nothing_is_measured_where_results_are_wrong(small_script, monkeypatch, tmp_path, capsys, error, message):
    fastest = choose_backends(None, torch.device("cpu"), torch.float32)[0]
    errors = {"reference": 1e-4, fastest: error}
    monkeypatch.setattr(correctness, "relative_error", lambda contender, case: errors[contender.backend])
    monkeypatch.setattr(correctness.Case, "train", lambda case, module: [torch.rand(3)])
    assert small_script.main([*ALL, "--output", "found"]) == 1
    assert f"D 8, 2 x 2 x 3 tokens: lstm, {fastest}{message}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_that_fails_leaves_the_page_of_the_others(small_script, monkeypatch, tmp_path, capsys):
    def fail(*args):
        raise RuntimeError("out of memory")

    for name in ("compare_models", "measure_loops"):
        monkeypatch.setattr(f"sequencer.measure.{name}", fail)
    assert small_script.main([*ALL, "--output", "found"]) == 1
    page = (tmp_path / "found" / "performance.md").read_text()
    assert page.count("error: out of memory") == 2
    assert "| ops, float32 | shape small, batch 1 | train | " in page
    assert "| growth | " in page


def test_the_kernels_without_a_gpu(script, monkeypatch, capsys):
    kernel_check = pytest.importorskip("sequencer.measure.kernel_check", reason="triton is not installed")
    code = MachineCode(146, 0, 9, 0, 33, 1085, 12, 12, 24)
    found = [kernel_check.Kernel("forward_panels", "64/4/2", 57_344, 3, code, [])]
    monkeypatch.setattr(kernel_check, "check_kernels", lambda capability, layer: found)
    assert script.main(["kernels", "--capability", "90"]) == 0
    printed = capsys.readouterr().out
    assert "sm_90" in printed
    assert "sm_80" not in printed
    assert " lstm, D 48, bfloat16 " in printed
    assert "0 faults" in printed
    found[0].faults.append("spills registers (4)")
    assert script.main(["kernels", "--capability", "80", "90"]) == 1
    printed = capsys.readouterr().out
    assert "spills registers (4)" in printed
    assert f"{2 * len(kernel_check.ALL_LAYERS)} faults" in printed


def test_the_kernels_under_the_interpreter(script, capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: True)
    assert script.main(["kernels", "--capability", "90"]) == 2
    assert "TRITON_INTERPRET=1 has Triton interpret its kernels instead of compiling them" in capsys.readouterr().err
