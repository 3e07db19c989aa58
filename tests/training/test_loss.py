"""The loss does what its configuration says."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import sequencer  # noqa: F401
from sequencer.config.errors import RequestError
from sequencer.config.schema import AugmentConfig, DataConfig, OptimConfig
from sequencer.data.mixing import build_mixup
from sequencer.export import save_model_folder
from sequencer.models import LoadedModel, load_model
from sequencer.training import run
from sequencer.training.loss import Teacher, build_criterion, build_teacher
from tests.helpers import equal_tensors, read_last, read_rows

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -3.0]])
LABELS = torch.tensor([0, 2])
SOFT = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.1, 0.9]])


def bce(logits, targets):
    return -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)).mean()


def test_cross_entropy_smooths_labels_and_not_targets():
    criterion = build_criterion(OptimConfig(), smoothing=0.3)
    logs, smoothed = LOGITS.log_softmax(-1), torch.full((2, 3), 0.1)
    smoothed[[0, 1], LABELS] = 0.8
    torch.testing.assert_close(criterion(LOGITS, LABELS), -(smoothed * logs).sum(-1).mean())
    torch.testing.assert_close(criterion(LOGITS, SOFT), -(SOFT * logs).sum(-1).mean())


def test_binary_cross_entropy():
    criterion = build_criterion(OptimConfig(loss="bce"), smoothing=0.3)
    smoothed = torch.full((2, 3), 0.1)
    smoothed[[0, 1], LABELS] = 0.8
    torch.testing.assert_close(criterion(LOGITS, LABELS), bce(LOGITS, smoothed))
    torch.testing.assert_close(criterion(LOGITS, SOFT), bce(LOGITS, SOFT))


def test_the_threshold_of_binary_cross_entropy():
    criterion = build_criterion(OptimConfig(loss="bce", bce_target_thresh=0.25), smoothing=0.0)
    torch.testing.assert_close(criterion(LOGITS, SOFT), bce(LOGITS, torch.tensor([[1.0, 1, 0], [0, 0, 1]])))


def network(**kwargs) -> torch.nn.Module:
    sizes = {"layers": [1], "patch_sizes": [2], "embed_dims": [16], "hidden_sizes": [4], "num_classes": 10}
    model = timm.create_model("sequencer2d_t_8", **(sizes | kwargs)).eval()
    torch.nn.init.normal_(model.head.fc.weight)  # zero at first, which ignores the images
    return model


def cfg(size: int, mean: float, std: float) -> dict:
    return {"input_size": (1, size, size), "mean": (mean,), "std": (std,)}


def digits_config(**kwargs) -> DataConfig:
    return DataConfig(name="digits", img_size=8, in_chans=1, mean=[0.3], std=[0.4], **kwargs)


def test_a_teacher_is_given_images_normalised_by_its_own_preprocessing():
    model = network()
    teacher = Teacher(LoadedModel(model, "sequencer2d_t_8", "raw", None, cfg(8, 0.5, 0.25)), digits_config(), 2.0)
    pixels = torch.rand(4, 1, 8, 8)
    logits = torch.randn(4, 10)
    wanted = (model((pixels - 0.5) / 0.25) / 2).softmax(-1)
    found = (logits / 2).log_softmax(-1)
    expected = (wanted * (wanted.log() - found)).sum(-1).mean() * 4
    torch.testing.assert_close(teacher.distance((pixels - 0.3) / 0.4, logits), expected.detach())


def test_a_teacher_of_another_size_is_given_resized_images():
    teacher = Teacher(LoadedModel(network(img_size=16), "", "raw", None, cfg(16, 0.5, 0.25)), digits_config(), 1.0)
    sizes = []
    teacher.model.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    teacher.distance(torch.rand(4, 1, 8, 8), torch.randn(4, 10))
    assert sizes == [(4, 1, 16, 16)]


def test_the_distance_of_equal_logits_is_zero():
    model = network()
    teacher = Teacher(LoadedModel(model, "", "raw", None, cfg(8, 0.3, 0.4)), digits_config(), 3.0)
    images = torch.rand(4, 1, 8, 8)
    logits = model(images).detach().requires_grad_()
    distance = teacher.distance(images, logits)
    distance.backward()
    assert distance.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.abs().max() < 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_with_a_teacher(config, tmp_path, finished):
    teacher = finished[0]
    options = [f"optim.distill_from={teacher}", "data.augment.mixup=0.4", "trainer.max_epochs=1"]
    saved, losses = {}, {}
    for name, weight in {"student": 1.0, "alone": 0.0}.items():
        run(config(*options, f"optim.distill_weight={weight}", run_dir=name))
        saved[name] = read_last(tmp_path / name)["state_dict"]
        log = (tmp_path / name / "train.log").read_text()
        assert f"INFO teacher: {teacher}, {weight:g} of the loss\n" in log
        losses[name] = float(read_rows(tmp_path / name)[0]["train/loss"])
    weights = load_model(teacher).model.state_dict()
    assert set(saved["student"]) == {f"model.{name}" for name in weights}  # without the teacher's
    assert not torch.equal(saved["student"]["model.head.fc.bias"], saved["alone"]["model.head.fc.bias"])
    assert losses["student"] < 0.1 < losses["alone"]  # the untrained student is about as unsure as its teacher
    run(config("data.augment.mixup=0.4", "trainer.max_epochs=1", run_dir="plain"))
    assert equal_tensors(read_last(tmp_path / "plain")["state_dict"], saved["alone"])
    assert "INFO teacher" not in (tmp_path / "plain" / "train.log").read_text()


@pytest.mark.slow
def test_a_student_learns_what_its_teacher_predicts(config, tmp_path):
    """The teacher predicts every digit as the next one."""
    run(config("trainer.max_epochs=12", "trainer.limit_train_batches=null", "optim.lr=1e-2", run_dir="teacher"))
    teacher = load_model(tmp_path / "teacher")
    teacher.model.head.fc.weight.data.copy_(teacher.model.head.fc.weight.data.roll(1, 0))
    teacher.model.head.fc.bias.data.copy_(teacher.model.head.fc.bias.data.roll(1, 0))
    save_model_folder(teacher, tmp_path / "wrong")
    long = ["trainer.max_epochs=12", "trainer.limit_train_batches=null", "optim.lr=1e-2"]
    taught = run(config(*long, f"optim.distill_from={tmp_path / 'wrong'}", "optim.distill_weight=1", run_dir="taught"))
    assert taught["val/top1"] < 0.1
    assert taught["val/loss"] > math.log(10)


def test_binary_cross_entropy_with_mixing_runs(config, tmp_path):
    summary = run(config("optim.loss=bce", "optim.bce_target_thresh=0.2", "data.augment.cutmix=1"))
    assert math.isfinite(summary["val/loss"])


def test_a_teacher_that_does_not_fit_is_refused(config, tmp_path, finished):
    with pytest.raises(RequestError, match=r"optim\.distill_from=nothing: nothing is neither a file"):
        run(config("optim.distill_from=nothing"))
    with pytest.raises(RequestError, match=r"takes images of 1 channels, data\.in_chans=3"):
        run(config(f"optim.distill_from={finished[0]}", "data.in_chans=3"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        ([*"abc"], "it has 10 classes, data=digits has 3"),
        ([*"1023456789"], "its classes have other names or another"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(finished, class_names, message):
    with pytest.raises(RequestError, match=message):
        build_teacher(OptimConfig(distill_from=str(finished[0])), digits_config(), class_names)


def test_mixing_gives_the_targets_that_the_criterion_takes():
    mix = build_mixup(AugmentConfig(mixup=1.0, smoothing=0.1), 3)
    _, targets = mix(torch.randn(2, 1, 4, 4), LABELS)
    for loss in ("bce", "cross_entropy"):
        assert build_criterion(OptimConfig(loss=loss), 0.1)(LOGITS, targets).isfinite()
