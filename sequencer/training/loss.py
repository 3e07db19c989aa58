"""The training loss: cross-entropy or binary cross-entropy, and distillation from a teacher."""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from sequencer.config.errors import RequestError
from sequencer.config.schema import DataConfig, OptimConfig
from sequencer.data import channel_statistics
from sequencer.files import to_json
from sequencer.models import CheckpointError, LoadedModel, load_model
from sequencer.models.exported import is_export


def build_criterion(config: OptimConfig, smoothing: float) -> nn.Module:
    """Builds the loss of logits `B K` and labels `B` or soft targets `B K`.

    Args:
        config: its `loss` is cross-entropy or binary cross-entropy, `bce_target_thresh` applies to the latter.
        smoothing: label smoothing; soft targets are taken as they are.
    """
    if config.loss == "bce":
        return BinaryCrossEntropy(smoothing=smoothing, target_threshold=config.bce_target_thresh)
    return _CrossEntropy(smoothing)


class _CrossEntropy(nn.Module):
    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = 0.0 if targets.is_floating_point() else self.smoothing
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)


class Teacher:
    """A fixed model that the trained one, the student, learns from (Hinton et al. 2015, arXiv 1503.02531).

    It is not an `nn.Module`, so that its weights are in no checkpoint and no optimizer. It receives the
    student's augmented and mixed images, resized and normalised as its own preprocessing requires.

    Attributes:
        fingerprint: Hash of its weights and preprocessing, by which a resumed run knows it again.
    """

    def __init__(self, loaded: LoadedModel, student: DataConfig, temperature: float) -> None:
        """
        Args:
            loaded: the teacher, with its preprocessing.
            student: the student's preprocessing.
            temperature: divides the logits of both.
        """
        self.model, self.temperature = loaded.model.requires_grad_(False), temperature
        self.fingerprint = _make_fingerprint(loaded)
        cfg = loaded.pretrained_cfg
        self.size = list(cfg["input_size"][-2:])
        mean, std = channel_statistics(student)
        # normalised pixels z of the student are z * scale + shift for the teacher
        self.scale = _channels(std) / _channels(cfg["std"])
        self.shift = (_channels(mean) - _channels(cfg["mean"])) / _channels(cfg["std"])

    def to(self, device: torch.device) -> None:
        """Moves the teacher to a device, in place."""
        self.model.to(device)
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)

    def distance(self, images: Float[Tensor, "B C H W"], logits: Float[Tensor, "B K"]) -> Float[Tensor, ""]:
        """Computes the Kullback-Leibler divergence of the student's softened probabilities from the teacher's.

        The mean over the batch times the squared temperature, which makes the scale of its gradient independent of the
        temperature (section 2 of the paper).

        Args:
            images: as the student sees them.
            logits: the student's, of the same images.
        """
        with torch.no_grad():
            seen = images * self.scale + self.shift
            if list(seen.shape[-2:]) != self.size:
                seen = F.interpolate(seen, self.size, mode="bicubic", align_corners=False)
            wanted = F.log_softmax(self.model(seen).float() / self.temperature, dim=-1)
        found = F.log_softmax(logits.float() / self.temperature, dim=-1)
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True) * self.temperature**2


def build_teacher(config: OptimConfig, data: DataConfig, class_names: list[str]) -> Teacher | None:
    """Loads the teacher `optim.distill_from` and checks that it fits the data; None where there is none.

    Raises:
        RequestError: the teacher cannot be loaded, or takes other classes or images of other channels.
    """
    if config.distill_from is None:
        return None
    where = f"optim.distill_from={config.distill_from}"
    try:
        loaded = load_model(config.distill_from)
    except CheckpointError as error:
        raise RequestError(f"{where}: {error}") from error
    if (channels := loaded.pretrained_cfg["input_size"][0]) != data.in_chans:
        raise RequestError(f"{where}: it takes images of {channels} channels, data.in_chans={data.in_chans}")
    classes = getattr(loaded.model, "num_classes", len(class_names))
    if classes != len(class_names):
        raise RequestError(f"{where}: it has {classes} classes, data={data.name} has {len(class_names)}")
    if loaded.about and loaded.class_names and list(loaded.class_names) != class_names:
        raise RequestError(f"{where}: its classes have other names or another order than those of data={data.name}")
    return Teacher(loaded, data, config.distill_temperature)


def _make_fingerprint(loaded: LoadedModel) -> str:
    preprocessing = {name: loaded.pretrained_cfg[name] for name in ("input_size", "mean", "std")}
    total = hashlib.sha256(to_json([loaded.arch, loaded.model_args, preprocessing]).encode())
    if is_export(loaded.source):  # its weights are in the graph
        total.update(Path(loaded.source).read_bytes())
    for name, tensor in loaded.model.state_dict().items():
        total.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


def _channels(values: tuple[float, ...] | list[float]) -> Float[Tensor, "C 1 1"]:
    return torch.tensor(values).view(-1, 1, 1)
