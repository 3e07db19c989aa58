"""Every knob of a run, with its meaning, unit, default and legal values.

The dataclasses are the schema; the YAML files beside this module hold values. Standard library and omegaconf
only, so that a request is validated before torch is imported. `knob` carries what the type cannot say; the
checks of `sequencer.config.request` and the configuration reference read it.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

BACKENDS = ("auto", "triton", "fused", "torch", "reference")


def knob(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    ours: bool = False,
    on_resume: bool = False,
) -> Any:
    """A dataclass field with its documentation and its bounds.

    Args:
        low, high: smallest and largest legal value, or that of each entry of a list; both inclusive.
        ours: in `TrainerConfig`, the key is not passed on to Lightning's Trainer.
        on_resume: the value may change when a run is resumed.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "ours": ours, "on_resume": on_resume}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by their dotted keys; an empty dictionary is a value."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= leaves(value, f"{prefix}.{name}" if prefix else str(name))
    return found


@dataclass
class AugmentConfig:
    """What training images go through; evaluation sees none of it. Names and meanings are timm's."""

    scale: list[float] | None = knob(
        None, "area range of RandomResizedCrop as fractions; null keeps the whole image, resized", low=0.0
    )
    ratio: list[float] = knob([0.75, 1.3333], "aspect-ratio range of RandomResizedCrop", low=0.0)
    crop_padding: int = knob(0, "pixels of zero padding before a random crop (small images)", low=0)
    hflip: float = knob(0.0, "probability of a horizontal flip", low=0.0, high=1.0)
    color_jitter: float = knob(0.0, "strength of brightness, contrast and saturation jitter", low=0.0)
    auto_augment: str | None = knob(None, "timm policy, e.g. rand-m9-mstd0.5-inc1 (RandAugment)")
    reprob: float = knob(0.0, "probability of random erasing", low=0.0, high=1.0)
    remode: str = knob("pixel", "what random erasing fills in", choices=("const", "rand", "pixel"))
    mixup: float = knob(0.0, "alpha of mixup; 0 turns it off", low=0.0)
    cutmix: float = knob(0.0, "alpha of CutMix; 0 turns it off", low=0.0)
    mixup_prob: float = knob(1.0, "probability that a batch is mixed at all", low=0.0, high=1.0)
    mixup_switch_prob: float = knob(0.5, "probability of CutMix where both are on", low=0.0, high=1.0)
    smoothing: float = knob(0.0, "label smoothing, training loss only", low=0.0, high=0.999)


@dataclass
class DataConfig:
    """The data set, how its images become tensors, and how they are served."""

    name: str = knob(
        MISSING,
        "data set",
        choices=(
            "digits",
            "mnist",
            "fashion_mnist",
            "cifar10",
            "cifar100",
            "flowers102",
            "stanford_cars",
            "imagefolder",
            "imagenet",
            "webdataset",
        ),
    )
    root: str = knob(
        "data",
        "folder that holds the set; an image folder has train/, val/ and optionally test/; shards may be at an http, "
        "https or s3 address",
    )
    download: bool = knob(False, "let torchvision fetch the set into data.root where it is missing")
    num_classes: int | None = knob(None, "number of classes; null counts the folders of an image folder", low=1)
    in_chans: int = knob(3, "image channels given to the model", low=1)
    img_size: int = knob(224, "height and width given to the model, pixels", low=1)
    mean: list[float] = knob([0.485, 0.456, 0.406], "channel means subtracted, images in 0..1")
    std: list[float] = knob([0.229, 0.224, 0.225], "channel standard deviations divided by", low=1e-12)
    crop_pct: float = knob(
        1.0, "evaluation: shorter side is resized to img_size / crop_pct, then cropped", low=0.01, high=1.0
    )
    interpolation: str = knob("bicubic", "resampling", choices=("nearest", "bilinear", "bicubic", "random"))
    default_model: str = knob(MISSING, "model built where model.name is not given")
    val_fraction: float = knob(
        0.1,
        "share of training images held out where the set has no validation part; the split ignores seed",
        low=0.0,
        high=0.9,
    )
    batch_size: int = knob(128, "images per forward pass, over all devices", low=1)
    check: bool = knob(False, "decode every image file before training starts")
    max_bad_share: float = knob(
        0.01, "share of a part's images that may be unreadable before the run stops", low=0.0, high=1.0
    )
    shuffle_buffer: int = knob(2048, "shards: images that a loader process reads ahead and shuffles", low=1)
    eval_batch_size: int = knob(256, "images per device in evaluation", low=1)
    num_workers: int = knob(2, "loader processes per device; 0 loads in the training process", low=0)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class ModelConfig:
    """The network. Names are timm's; any timm model may be named as a baseline."""

    name: str = knob("${data.default_model}", "registered model name")
    pretrained: bool = knob(False, "start from the published weights (downloaded by timm)")
    num_classes: int | None = knob("${data.num_classes}", "size of the head; null takes the data's", low=1)
    in_chans: int = knob("${data.in_chans}", "input channels", low=1)
    img_size: int = knob("${data.img_size}", "input height and width, pixels", low=1)
    drop_rate: float = knob(0.0, "dropout before the head", low=0.0, high=0.999)
    drop_path_rate: float = knob(0.0, "stochastic depth of the last block; grows linearly from 0", low=0.0, high=0.999)
    grad_checkpointing: bool = knob(False, "recompute activations in the backward pass: less memory, more time")
    backend: str | None = knob(
        None,
        "preferred kernels of the recurrences; null takes what SEQUENCER_BACKEND says, or else the fastest",
        choices=BACKENDS,
    )
    recompute: bool = knob(False, "run recurrences again in the backward pass, fused kernels only: less memory")
    kwargs: dict[str, Any] = knob({}, "further arguments of the model, e.g. '{cell: gru, bidirectional: false}'")


@dataclass
class OptimConfig:
    """Optimizer, schedule and weight averaging. Names are timm's."""

    opt: str = knob("adamw", "any optimizer of timm's factory")
    lr: float = knob(1e-3, "peak learning rate, for the global batch as it is", low=0.0)
    weight_decay: float = knob(
        0.05, "applied to matrices only: biases, norms and position embeddings are spared", low=0.0
    )
    momentum: float = knob(0.9, "momentum of SGD and its kin", low=0.0, high=1.0)
    opt_betas: list[float] | None = knob(
        None, "betas of Adam and its kin; null keeps the optimizer's own", low=0.0, high=1.0
    )
    opt_eps: float | None = knob(None, "epsilon; null keeps the optimizer's own", low=0.0)
    layer_decay: float | None = knob(
        None, "learning-rate factor per layer below the head; null turns it off", low=0.0, high=1.0
    )
    sched: str = knob(
        "cosine", "learning-rate schedule, stepped after every update", choices=("cosine", "linear", "constant")
    )
    warmup_epochs: float = knob(0.0, "epochs of linear warm-up, part of trainer.max_epochs", low=0.0)
    warmup_lr: float = knob(1e-6, "learning rate at the first update of the warm-up", low=0.0)
    min_lr: float = knob(1e-6, "learning rate at the end of the schedule", low=0.0)
    cooldown_epochs: float = knob(0.0, "last epochs, spent at min_lr", low=0.0)
    ema_decay: float | None = knob(
        None, "decay of the moving average of the weights; null turns it off", low=0.0, high=1.0
    )
    loss: str = knob(
        "cross_entropy",
        "training loss: cross-entropy, or binary cross-entropy of every class by itself (soft targets too)",
        choices=("cross_entropy", "bce"),
    )
    bce_target_thresh: float | None = knob(
        None, "bce: soft targets above it count as 1 and the others as 0; null keeps them soft", low=0.0, high=1.0
    )
    distill_from: str | None = knob(
        None, "teacher: a run, model folder, checkpoint or timm name with the data's classes; null trains without one"
    )
    distill_weight: float = knob(0.5, "share of the loss that is the distance from the teacher", low=0.0, high=1.0)
    distill_temperature: float = knob(1.0, "divides both models' logits in that distance", low=1e-3)
    ema_warmup: bool = knob(True, "raise the decay from 0 in the first updates, so that short runs average too")


@dataclass
class TrainerConfig:
    """How the run is driven. Keys that are not marked `ours` carry the names of Lightning's Trainer."""

    max_epochs: int = knob(10, "epochs", low=1, on_resume=True)
    max_steps: int = knob(-1, "updates after which the run ends early; -1 sets no limit", low=-1)
    limit_train_batches: int | float | None = knob(
        None, "batches (int) or share (float) of an epoch; null takes all", low=0
    )
    limit_val_batches: int | float | None = knob(None, "likewise for validation", low=0)
    limit_test_batches: int | float | None = knob(None, "likewise for the test part", low=0)
    accelerator: str = knob("auto", "device kind", choices=("auto", "cpu", "gpu", "cuda", "mps", "tpu"), on_resume=True)
    devices: int | str = knob(1, "number of devices, or auto for all", on_resume=True)
    num_nodes: int = knob(1, "number of machines", low=1, on_resume=True)
    strategy: str = knob("auto", "distribution strategy, e.g. ddp")
    precision: str = knob("32", "numeric precision", choices=("32", "bf16-mixed", "16-mixed"))
    gradient_clip_val: float | None = knob(None, "largest gradient norm; null turns clipping off", low=0.0)
    accumulate_grad_batches: int = knob(1, "forward passes per update", low=1)
    deterministic: bool = knob(False, "deterministic kernels only; an operation without one is an error")
    benchmark: bool = knob(False, "let cuDNN try its algorithms for the input shape")
    checkpoint_interval: float = knob(
        300.0, "seconds between two saves within an epoch; 0 saves after every update", low=0.0, ours=True
    )
    max_loss: float = knob(
        1000.0, "a larger training loss is divergence, as one that is not finite", low=0.0, ours=True
    )
    on_divergence: str = knob(
        "stop",
        "whether the run ends there or goes back to its last checkpoint and takes the images that follow in another "
        "order",
        choices=("stop", "rollback"),
        ours=True,
    )
    log_every_n_steps: int = knob(50, "updates between two logged training losses", low=1)
    enable_progress_bar: bool = knob(
        True, "draw the progress bar; it is left out where the output is no terminal", ours=True
    )
    compile: bool = knob(False, "run the model through torch.compile", ours=True)
    best_metric: str = knob(
        "val/top1",
        "decides checkpoints/best.ckpt; epoch takes the last one",
        choices=("epoch", "val/top1", "val/top5", "val/loss", "val_ema/top1", "val_ema/top5", "val_ema/loss"),
        ours=True,
    )
    slot: str = knob("raw", "weights that model/ and the test metrics use", choices=("raw", "ema"), ours=True)
    early_stopping_patience: int | None = knob(
        None, "epochs without a better best_metric before the run ends; null never", low=1, ours=True
    )


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.csv, which every run writes."""

    wandb: bool = knob(False, "log to Weights & Biases: online where a key is set, offline otherwise", on_resume=True)
    tensorboard: bool = knob(False, "write TensorBoard event files into the run folder", on_resume=True)
    project: str = knob("sequencer", "W&B project", on_resume=True)
    entity: str | None = knob(None, "W&B user or team; null takes the account's default", on_resume=True)


@dataclass
class Config:
    """A whole run."""

    name: str = knob("${data.name}", "name of the run: its folder and its title in loggers")
    seed: int = knob(0, "seed of everything random", low=0, high=2**32 - 1)
    run_dir: str = knob("outputs/${name}/${now:%Y-%m-%d_%H-%M-%S}", "folder that the run writes to")
    init_from: str | None = knob(
        None,
        "start from the weights of a run, model folder, checkpoint or timm name; a head of other classes is replaced",
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


def lower_is_better(metric: str) -> bool:
    """Whether `trainer.best_metric` improves by falling."""
    return metric.endswith("loss")


def lightning_settings(section: TrainerConfig) -> dict[str, Any]:
    """The keys of the section that are arguments of Lightning's Trainer, with their values."""
    return {f.name: getattr(section, f.name) for f in fields(section) if not f.metadata["ours"]}
