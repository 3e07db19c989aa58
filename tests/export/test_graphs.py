"""Exported graphs compute the outputs of their models, for every cell and union."""

import functools
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sequencer.export import Mismatch, export_graph, recurrence
from sequencer.export.verify import compare
from sequencer.models import LoadedModel, create_model, load_exported, load_model
from sequencer.ops import Weights

ONE_STAGE = {"layers": (1,), "patch_sizes": (4,), "embed_dims": (12,), "hidden_sizes": (5,), "num_classes": 3}
TWO_STAGES = {"layers": (1, 1), "patch_sizes": (4, 2), "embed_dims": (12, 16), "hidden_sizes": (5, 4)}
CFG = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "crop_pct": 1.0, "interpolation": "bicubic"}


def loaded(name: str = "sequencer2d_s", img_size: int = 16, **kwargs) -> LoadedModel:
    """Builds a small model with random weights, large enough that every gate affects the outputs."""
    args = ONE_STAGE | kwargs
    model = create_model(name, img_size=img_size, **args)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    cfg = CFG | {"input_size": (3, img_size, img_size)}
    return LoadedModel(model.eval(), name, "raw", ("a", "b", "c"), cfg, args)


def nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[..., tuple[LoadedModel, dict[str, Any], Path]]:
    """`exported(form, **kwargs)` is a small model with the certificate and the folder of its export.

    Each is exported once, and is not to be changed.
    """

    @functools.cache
    def export(form: str, **kwargs) -> tuple[LoadedModel, dict[str, Any], Path]:
        original, folder = loaded(**kwargs), tmp_path_factory.mktemp("exported")
        return original, export_graph(original, folder, form, 16), folder

    return export


VARIANTS = {
    "lstm, two stages": (TWO_STAGES, "LSTM", 4),
    "gru": ({"cell": "gru"}, "GRU", 2),
    "rnn": ({"cell": "rnn"}, "RNN", 2),
    "rnn_relu, added": ({"cell": "rnn_relu", "union": "add"}, "RNN", 2),
    "peephole, one direction": ({"cell": "peephole_lstm", "bidirectional": False}, "LSTM", 2),
    "peephole": ({"cell": "peephole_lstm"}, "LSTM", 2),
    "indylstm": ({"cell": "indylstm"}, "LSTM", 2),
    "lstm1997, columns": ({"cell": "lstm1997", "union": "vertical"}, "LSTM", 1),
    "rows, two layers": ({"union": "horizontal", "num_rnn_layers": 2}, "LSTM", 2),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_recurrence_is_one_onnx_operator(variant, exported):
    kwargs, operator, number = VARIANTS[variant]
    original, certificate, folder = exported("onnx", **kwargs)
    assert certificate["max_error"] < 2e-6 * certificate["largest_output"]
    path = folder / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    found = nodes(path)
    assert found[operator] == number
    assert not {"Scan", "Loop", "Slice", "If"} & found.keys()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [one.name for one in (*session.get_inputs(), *session.get_outputs())] == ["image", "logits"]
    x = torch.randn(5, 3, 16, 16)  # not the batch size of the export
    (logits,) = session.run(None, {"image": x.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), original.model(x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "kwargs",
    # the weights of an lstm1997 are converted as for ONNX
    [TWO_STAGES, {"cell": "indylstm"}, pytest.param({"cell": "lstm1997"}, marks=pytest.mark.slow), {"cell": "gru"}],
)
def test_torch_export_programs(kwargs, exported):
    original, certificate, folder = exported("torch_export", **kwargs)
    assert certificate["max_error"] < 2e-6 * certificate["largest_output"]
    x = torch.randn(5, 3, 16, 16)
    program = load_exported(folder / "model.pt2", trust=True)
    with torch.inference_mode():
        torch.testing.assert_close(program(x), original.model(x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_vsequencer_with_position_embedding_at_another_size(form, tmp_path):
    original = loaded("v_sequencer_s", hidden_sizes=(6,), ape=True)
    assert original.model.absolute_pos_embed is not None
    assert export_graph(original, tmp_path, form, 24)["input_size"] == [3, 24, 24]


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_float16_with_preprocessing(form, tmp_path):
    original = loaded()
    original.model.head.fc.weight.data *= 0.1  # probabilities that are not all 0 or 1
    certificate = export_graph(original, tmp_path, form, 16, "fp16", with_preprocessing=True)
    assert (certificate["outputs"], certificate["dtype"]) == ("probabilities", "fp16")
    assert 0 < certificate["max_error"] < 2e-2
    image = np.random.RandomState(0).randint(256, size=(4, 16, 16, 3), dtype=np.uint8)
    mean, std = (torch.tensor(CFG[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = (torch.from_numpy(image).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        expected = original.model(x).softmax(1)
        if form == "onnx":
            session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(["probabilities"], {"image": image})[0])
            assert onnx.load(tmp_path / "model.onnx").graph.initializer[0].data_type == onnx.TensorProto.FLOAT16
        else:
            found = torch.export.load(tmp_path / "model.pt2").module()(torch.from_numpy(image))
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
        assert not torch.equal(found, expected)
        again = load_exported(tmp_path / ("model.onnx" if form == "onnx" else "model.pt2"), trust=True)
        torch.testing.assert_close(again(x).softmax(1), found, atol=1e-5, rtol=0)


def test_exported_files_load_as_models(tmp_path):
    about = {"config": {"data": {"name": "digits", "img_size": 16}}, "commit": "c0ffee"}
    export_graph(replace(loaded(), about=about, slot="ema"), tmp_path, "onnx", 24)
    found = load_model(tmp_path / "model.onnx")
    assert (found.arch, found.slot, found.class_names) == ("sequencer2d_s", "ema", ("a", "b", "c"))
    assert found.pretrained_cfg == CFG | {"input_size": (3, 24, 24)}
    assert found.data == {"name": "digits", "img_size": 24}
    assert found.about["commit"] == "c0ffee"
    with pytest.raises(ValueError, match="exported for images of 3x24x24, not 3x16x16"):
        found.model(torch.zeros(1, 3, 16, 16))


def test_exported_files_run_without_this_package(exported, tmp_path):
    for form, name in (("onnx", "model.onnx"), ("torch_export", "model.pt2")):
        original, _, folder = exported(form, cell="indylstm")
        shutil.copy(folder / name, tmp_path)
    x = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        np.savez(tmp_path / "case.npz", x=x, y=original.model(x))
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "sys.modules['sequencer'] = sys.modules['timm'] = None\n"
        "import numpy, onnxruntime, torch\n"
        "case = numpy.load('case.npz')\n"
        "(y,) = onnxruntime.InferenceSession('model.onnx').run(None, {'image': case['x']})\n"
        "numpy.testing.assert_allclose(y, case['y'], atol=2e-5, rtol=2e-5)\n"
        "y = torch.export.load('model.pt2').module()(torch.tensor(case['x'])).detach()\n"
        "numpy.testing.assert_allclose(y, case['y'], atol=2e-5, rtol=2e-5)\n"
    )
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_different_outputs_are_a_mismatch(tmp_path, monkeypatch):
    exact = recurrence.as_lstm

    def almost(w: Weights, cell: str) -> Weights:
        weights = exact(w, cell)
        return weights._replace(bias_ih=weights.bias_ih + 1e-2)

    monkeypatch.setattr(recurrence, "as_lstm", almost)
    with pytest.raises(Mismatch, match=r"the export differs from the model by .* it was not kept"):
        export_graph(loaded(cell="indylstm"), tmp_path, "torch_export", 16)


def test_nan_outputs_are_a_mismatch():
    model = loaded().model
    torch.nn.init.constant_(model.head.fc.bias, torch.nan)
    with pytest.raises(Mismatch, match="differs from the model by nan"):
        compare(model, model, torch.zeros(12, 3, 16, 16), "fp32")
