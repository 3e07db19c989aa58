"""Loading of weights from files of every layout, and the errors for files that do not fit."""

import argparse
import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from sequencer.models import (
    CheckpointError,
    create_model,
    load_model,
    load_weights,
    read_checkpoint,
    read_weights,
    select_weights,
)

SMALL = {
    "layers": (2, 1),
    "patch_sizes": (2, 2),
    "embed_dims": (16, 24),
    "hidden_sizes": (4, 6),
    "num_classes": 5,
    "img_size": 8,
}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def model() -> torch.nn.Module:
    return randomised(create_model("sequencer2d_s", **SMALL))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def to_paper_layout(weights: dict[str, torch.Tensor], layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Renames timm's keys to those of the paper's repository, independently of the package's own function."""
    out = {}
    for name, tensor in weights.items():
        stage = re.match(r"stages\.(\d+)\.(blocks\.(\d+)|downsample)\.(.*)", name)
        if stage is None:
            out[name.replace("head.fc.", "head.")] = tensor
        elif stage[3] is not None:
            out[f"blocks.{stage[1]}.{stage[3]}.{stage[4]}"] = tensor
        else:
            before = int(stage[1]) - 1
            out[f"blocks.{before}.{layers[before]}.{stage[4]}"] = tensor
    return out


def prefixed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


LAYOUTS = {
    "timm": lambda w: w,
    "paper": lambda w: to_paper_layout(w, SMALL["layers"]),
    "paper in model": lambda w: {"model": to_paper_layout(w, SMALL["layers"]), "args": argparse.Namespace(lr=0.1)},
    "paper ema": lambda w: {"model_ema": to_paper_layout(w, SMALL["layers"])},
    "ddp": lambda w: {"state_dict": prefixed(w, "module.")},
    "compiled": lambda w: {"state_dict": prefixed(w, "_orig_mod.")},
    "compiled in ddp": lambda w: prefixed(w, "module._orig_mod."),
    "lightning": lambda w: {"state_dict": prefixed(w, "model."), "epoch": 3},
    "lightning compiled": lambda w: {"state_dict": prefixed(w, "model._orig_mod.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(model, layout, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](model.state_dict()), path)
    other = create_model("sequencer2d_s", **SMALL)
    assert load_weights(other, read_weights(path)) == []
    assert same(other.state_dict(), model.state_dict())


def test_paper_layout_of_the_vanilla_sequencer(tmp_path):
    small = SMALL | {"hidden_sizes": (8, 12), "ape": True}
    model = randomised(create_model("v_sequencer_s", **small))
    weights = to_paper_layout(model.state_dict(), SMALL["layers"])
    assert "blocks.0.2.down.weight" in weights
    assert "blocks.1.0.rnn_tokens.rnn.weight_hh_l0_reverse" in weights
    other = create_model("v_sequencer_s", **small)
    load_weights(other, select_weights({"model": weights}))
    assert same(other.state_dict(), model.state_dict())


def test_slots(model):
    raw = model.state_dict()
    ema = {name: tensor + 1 for name, tensor in raw.items()}
    both = {"state_dict": raw, "state_dict_ema": ema}
    assert same(select_weights(both), raw)
    assert same(select_weights(both, "raw"), raw)
    assert same(select_weights(both, "ema"), ema)
    with pytest.raises(CheckpointError, match="no EMA weights"):
        select_weights({"state_dict": raw}, "ema")


def test_weights_that_do_not_fit_raise_and_change_nothing(model):
    before = copy.deepcopy(model.state_dict())
    weights = dict(before)
    del weights["norm.bias"]
    weights["surplus"] = torch.zeros(1)
    weights["head.fc.weight"] = torch.zeros(7, 24)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, weights, source="x.pth")
    message = str(error.value)
    for part in ("x.pth does not fit Sequencer2d", "1 missing: norm.bias", "1 unexpected: surplus"):
        assert part in message
    assert "head.fc.weight (7, 24) for (5, 24)" in message
    assert same(model.state_dict(), before)


def test_a_long_list_of_differences_is_abridged(model):
    with pytest.raises(CheckpointError, match="and 40 more"):
        load_weights(model, dict(list(model.state_dict().items())[43:]))
    assert len(model.state_dict()) > 43


def test_replacing_the_head(model):
    other = create_model("sequencer2d_s", **(SMALL | {"num_classes": 3}))
    kept = load_weights(other, model.state_dict(), replace_head=True)
    assert kept == ["head.fc.weight", "head.fc.bias"]
    assert torch.equal(other.stem.proj.weight, model.stem.proj.weight)
    assert other.head.fc.weight.abs().sum() == 0
    with pytest.raises(CheckpointError, match="another shape"):
        load_weights(other, model.state_dict())


def test_position_embedding_is_resampled():
    small = SMALL | {"hidden_sizes": (8, 12), "ape": True}
    weights = randomised(create_model("v_sequencer_s", **small)).state_dict()
    larger = create_model("v_sequencer_s", **(small | {"img_size": 16}))
    load_weights(larger, weights)
    assert larger.absolute_pos_embed.shape == (1, 8, 8, 16)
    torch.testing.assert_close(larger.absolute_pos_embed.mean(), weights["absolute_pos_embed"].mean(), atol=0.1, rtol=0)


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_checkpoints_with_code_are_refused(tmp_path):
    mark = tmp_path / "code was run"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "extra": Evil(mark)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="not loaded"):
        read_checkpoint(tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "plain.pth")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors", "text.pth", "empty.pth", "missing.pth", "list.pth"])
def test_damaged_files(model, name, tmp_path):
    path = tmp_path / name
    if name == "cut.pth":
        torch.save(model.state_dict(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif name == "cut.safetensors":
        save_file(model.state_dict(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif name == "text.pth":
        path.write_text("not a checkpoint")
    elif name == "empty.pth":
        path.touch()
    elif name == "list.pth":
        torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as error:
        read_checkpoint(path)
    assert len(str(error.value).splitlines()) <= 2


def test_altered_weights_are_damage(model, tmp_path):
    """torch itself loads such a file."""
    path = tmp_path / "altered.pth"
    torch.save(model.state_dict(), path)
    content = bytearray(path.read_bytes())
    position = content.find(model.stem.proj.weight.detach().numpy().tobytes())
    content[position] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
        read_checkpoint(path)


def write_model_folder(folder: Path, model: torch.nn.Module) -> None:
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "sequencer2d_s",
        "num_classes": 5,
        "label_names": list("abcde"),
        "model_args": {key: value for key, value in SMALL.items() if key != "num_classes"},
        "pretrained_cfg": {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3},
        "slot": "ema",
        "config": {"data": {"name": "digits"}},
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("where", ["model", "."])
def test_model_folder(model, where, tmp_path):
    write_model_folder(tmp_path / "run" / "model", model)
    loaded = load_model(tmp_path / "run" / ("" if where == "model" else "model"))
    assert same(loaded.model.state_dict(), model.state_dict())
    assert (loaded.arch, loaded.slot, loaded.class_names) == ("sequencer2d_s", "ema", tuple("abcde"))
    assert loaded.data == {"name": "digits"}
    assert not loaded.model.training


def run_checkpoint(model: torch.nn.Module) -> dict:
    raw = prefixed(model.state_dict(), "model.")
    data = {
        "name": "digits", "in_chans": 3, "img_size": 8, "mean": [0.5], "std": [0.5], "crop_pct": 1.0,
        "interpolation": "bicubic",
    }  # fmt: skip
    kwargs = {key: value for key, value in SMALL.items() if key not in ("num_classes", "img_size")}
    section = {"name": "sequencer2d_s", "in_chans": 3, "img_size": 8, "kwargs": kwargs}
    return {
        "state_dict": raw,
        "state_dict_ema": {name: tensor + 1 for name, tensor in model.state_dict().items()},
        "config": {"data": data, "model": section, "trainer": {"slot": "ema"}},
        "class_names": list("abcde"),
    }


def test_checkpoint_of_a_run(model, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(run_checkpoint(model), folder / "checkpoints" / "last.ckpt")
    for source in (folder, folder / "checkpoints" / "last.ckpt"):
        loaded = load_model(source)
        assert loaded.slot == "ema"
        assert torch.equal(loaded.model.norm.bias, model.norm.bias + 1)
        assert loaded.class_names == tuple("abcde")
        assert loaded.pretrained_cfg["input_size"] == (3, 8, 8)
    assert torch.equal(load_model(folder, slot="raw").model.norm.bias, model.norm.bias)


def test_slot_of_a_run_folder(model, tmp_path):
    """A model folder has the weights of one slot; the other one's are in the checkpoints, of which the best is read."""
    run = tmp_path / "run"
    write_model_folder(run / "model", model)  # slot: ema
    with pytest.raises(CheckpointError, match="holds the ema weights alone, not the raw ones"):
        load_model(run, slot="raw")
    (run / "checkpoints").mkdir()
    checkpoint = run_checkpoint(model)
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    checkpoint["state_dict"] = {name: tensor + 2 for name, tensor in checkpoint["state_dict"].items()}
    torch.save(checkpoint, run / "checkpoints" / "best.ckpt")
    loaded = load_model(run, slot="raw")
    assert loaded.slot == "raw"
    assert torch.equal(loaded.model.norm.bias, model.norm.bias + 2)
    assert torch.equal(load_model(run, slot="ema").model.norm.bias, model.norm.bias)


def test_weights_with_an_architecture(tmp_path):
    model = randomised(create_model("sequencer2d_t_8", num_classes=4))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model(tmp_path / "w.safetensors", arch="sequencer2d_t_8")
    assert loaded.model.num_classes == 4
    assert same(loaded.model.state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="--arch"):
        load_model(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model(tmp_path / "w.safetensors", arch="sequencer2d_t_64")


def test_sources_that_are_not_models_raise(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run nor a model folder"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="neither a file or folder nor a timm model name"):
        load_model("no_such_thing")
    with pytest.raises(CheckpointError, match="no published weights"):
        load_model("sequencer2d_t_8")
    with pytest.raises(CheckpointError, match=r"did you mean .*sequencer2d_s"):
        create_model("sequencer2d_ss")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path)


def test_published_weights_load_by_timms_own_function(tmp_path):
    """A file of weights of timm's own model, which stands for the download, loads into this package's model."""
    from timm.models.sequencer import sequencer2d_s as timm_sequencer2d_s

    theirs = randomised(timm_sequencer2d_s())
    save_file(theirs.state_dict(), tmp_path / "published.safetensors")
    overlay = {"file": str(tmp_path / "published.safetensors")}
    ours = timm.create_model("sequencer2d_s", pretrained=True, pretrained_cfg_overlay=overlay)
    assert same(ours.state_dict(), theirs.state_dict())
