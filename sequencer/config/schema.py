"""Every key of a run's configuration, with its meaning, unit, default and legal values.

The dataclasses are the schema; the YAML files in `conf/` hold values. `knob` carries what a type cannot express; the
validation and `docs/configuration.md` read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sequencer.names import BACKENDS, DATA_SETS, LARGEST_IMAGE, MOST_CLASSES

MISSING: Any = "???"  # that of omegaconf, which takes a moment to import
MOST_WORKERS = 1024
LARGEST_INTEGER = 2**31 - 1  # of values without another bound; PyTorch counts with it everywhere


def knob(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    finite: bool = True,
    path: bool = False,
    ours: bool = False,
    on_resume: bool = False,
) -> Any:
    """A dataclass field with its documentation and its bounds.

    Args:
        low, high: smallest and largest legal value, or that of each entry of a list; both inclusive.
        finite: infinity is not legal; NaN never is.
        path: the value names a file or folder, or may do so.
        ours: in `TrainerConfig`, the key is not passed on to Lightning's Trainer.
        on_resume: the value may change when a run is resumed.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "finite": finite, "path": path}
    metadata |= {"ours": ours, "on_resume": on_resume}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries to dotted keys; an empty dictionary counts as a value."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= leaves(value, f"{prefix}.{name}" if prefix else str(name))
    return found


@dataclass
class AugmentConfig:
    """Augmentation of the training images. Names and meanings are timm's."""

    scale: list[float] | None = knob(
        None, "range of the area of RandomResizedCrop, as fractions; null resizes the whole image", low=0.0
    )
    ratio: list[float] = knob([0.75, 1.3333], "aspect-ratio range of RandomResizedCrop", low=0.0)
    crop_padding: int = knob(0, "pixels of zero padding before a random crop (small images)", low=0)
    hflip: float = knob(0.0, "probability of a horizontal flip", low=0.0, high=1.0)
    color_jitter: float = knob(0.0, "strength of brightness, contrast and saturation jitter", low=0.0, high=100.0)
    auto_augment: str | None = knob(None, "timm policy, e.g. rand-m9-mstd0.5-inc1 (RandAugment)")
    sizes: list[int] | None = knob(
        None,
        "heights and widths that training images are reduced to, one after another in equal parts of the epochs, e.g. "
        "[16, 24, 32]; null keeps img_size, at which the model is evaluated in any case",
        low=1,
    )
    reprob: float = knob(0.0, "probability of random erasing", low=0.0, high=1.0)
    remode: str = knob("pixel", "fill of erased rectangles", choices=("const", "rand", "pixel"))
    mixup: float = knob(0.0, "alpha of mixup; 0 turns it off", low=0.0)
    cutmix: float = knob(0.0, "alpha of CutMix; 0 turns it off", low=0.0)
    mixup_prob: float = knob(1.0, "probability that a batch is mixed", low=0.0, high=1.0)
    mixup_switch_prob: float = knob(0.5, "probability of CutMix instead of mixup if both are on", low=0.0, high=1.0)
    smoothing: float = knob(0.0, "label smoothing of the training loss", low=0.0, high=0.999)


@dataclass
class DataConfig:
    """The data set, the preprocessing of its images, and their loading."""

    name: str = knob(MISSING, "data set", choices=DATA_SETS)
    root: str = knob(
        "data",
        "folder of the data set; an image folder has train/, val/ and optionally test/; of a file list, the CSV or "
        "Parquet file; shards may also be at an http, https or s3 address",
        path=True,
        on_resume=True,  # the fingerprints of the splits show whether the data are the same
    )
    download: bool = knob(False, "let torchvision download the data set into data.root if it is missing")
    num_classes: int | None = knob(
        None, "number of classes; null takes those of the data set", low=1, high=MOST_CLASSES
    )
    in_chans: int = knob(3, "channels of the model's input", low=1)
    img_size: int = knob(224, "height and width of the model's input, pixels", low=1, high=LARGEST_IMAGE)
    mean: list[float] = knob([0.485, 0.456, 0.406], "mean of each channel, for images in [0, 1]", low=-1e6, high=1e6)
    std: list[float] = knob([0.229, 0.224, 0.225], "standard deviation of each channel", low=1e-12, high=1e6)
    crop_pct: float = knob(
        1.0, "evaluation: the shorter side is resized to img_size / crop_pct before the centre crop", low=0.01, high=1.0
    )
    interpolation: str = knob(
        "bicubic", "interpolation of resizing", choices=("nearest", "bilinear", "bicubic", "random")
    )
    default_model: str = knob(MISSING, "model that is built if model.name is not given")
    val_fraction: float = knob(
        0.1,
        "fraction of the training images that is the validation split of data sets without one, whatever the seed",
        low=0.0,
        high=0.9,
    )
    test_fraction: float = knob(
        0.0,
        "file list: fraction of the training images that is the test split of a list without one, whatever the seed",
        low=0.0,
        high=0.9,
    )
    path_column: str = knob("path", "file list: column of the images' paths, which start from the list's folder")
    label_column: str = knob("label", "file list: column of the labels; the classes are the labels, sorted")
    split_column: str | None = knob(
        "split",
        "file list: column with train, val or test; a list without it, or null, is divided by the fractions",
    )
    batch_size: int = knob(128, "images per forward pass, summed over all devices", low=1)
    check: bool = knob(False, "decode every image file before training starts")
    max_bad_share: float = knob(
        0.01, "fraction of a split's images that may be unreadable before the run stops", low=0.0, high=1.0
    )
    shuffle_buffer: int = knob(2048, "shards: size of the shuffle buffer of a loader worker, images", low=1)
    eval_batch_size: int = knob(256, "images per device in evaluation", low=1)
    num_workers: int = knob(2, "loader workers per device; 0 loads in the training process", low=0, high=MOST_WORKERS)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class ModelConfig:
    """The model. Names are timm's; every timm model can be trained as a baseline."""

    name: str = knob("${data.default_model}", "registered model name")
    pretrained: bool = knob(False, "start from the published weights (downloaded by timm)")
    num_classes: int | None = knob("${data.num_classes}", "number of classes; null takes that of the data", low=1)
    in_chans: int = knob("${data.in_chans}", "input channels", low=1)
    img_size: int = knob("${data.img_size}", "input height and width, pixels", low=1)
    drop_rate: float = knob(0.0, "dropout before the head", low=0.0, high=0.999)
    drop_path_rate: float = knob(0.0, "stochastic depth of the last block; grows linearly from 0", low=0.0, high=0.999)
    grad_checkpointing: bool = knob(
        False, "recompute the activations of each block in the backward pass: less memory, more time"
    )
    backend: str | None = knob(
        None,
        "preferred kernels of the recurrences; null takes SEQUENCER_BACKEND, or else the fastest",
        choices=BACKENDS,
    )
    recompute: bool = knob(
        False, "recompute the recurrences in the backward pass (fused kernels only): less memory, more time"
    )
    kwargs: dict[str, Any] = knob({}, "further arguments of the model, e.g. '{cell: gru, bidirectional: false}'")


@dataclass
class OptimConfig:
    """Optimizer, schedule and weight averaging. Names are timm's."""

    opt: str = knob("adamw", "name of an optimizer in timm's factory")
    lr: float = knob(1e-3, "peak learning rate; it is not scaled with the batch size", low=0.0, high=1e3)
    weight_decay: float = knob(
        0.05, "weight decay of matrices; biases, norms and position embeddings have none", low=0.0, high=1e3
    )
    momentum: float = knob(0.9, "momentum of SGD-like optimizers", low=0.0, high=1.0)
    opt_betas: list[float] | None = knob(
        None, "betas of Adam-like optimizers; null keeps the optimizer's own", low=0.0, high=1.0
    )
    opt_eps: float | None = knob(None, "epsilon; null keeps the optimizer's own", low=1e-30, high=1e6)
    layer_decay: float | None = knob(
        None, "factor on the learning rate for each layer further from the head; null turns it off", low=0.0, high=1.0
    )
    sched: str = knob(
        "cosine", "learning-rate schedule, stepped after every update", choices=("cosine", "linear", "constant")
    )
    warmup_epochs: float = knob(
        0.0,
        "epochs of linear warm-up, part of trainer.max_epochs; warm-up and cool-down that would take all of it are "
        "shortened to half of it",
        low=0.0,
    )
    warmup_lr: float = knob(1e-6, "learning rate at the first update of the warm-up", low=0.0, high=1e3)
    min_lr: float = knob(1e-6, "learning rate at the end of the schedule", low=0.0, high=1e3)
    cooldown_epochs: float = knob(0.0, "epochs at min_lr at the end, part of trainer.max_epochs", low=0.0)
    ema_decay: float | None = knob(
        None, "decay of the moving average of the weights; null turns it off", low=0.0, high=1.0
    )
    loss: str = knob(
        "cross_entropy",
        "training loss: cross-entropy, or binary cross-entropy of each class; both take soft targets",
        choices=("cross_entropy", "bce"),
    )
    bce_target_thresh: float | None = knob(
        None, "bce: threshold at which soft targets become 0 or 1; null keeps them soft", low=0.0, high=1.0
    )
    distill_from: str | None = knob(
        None,
        "teacher for distillation: a run, model folder, checkpoint or timm name with the classes of the data, or null",
        path=True,
    )
    distill_weight: float = knob(
        0.5, "weight of the distillation loss; the training loss has one minus that", low=0.0, high=1.0
    )
    distill_temperature: float = knob(1.0, "temperature of the softmax in the distillation loss", low=1e-3)
    ema_warmup: bool = knob(True, "raise the decay from 0 over the first updates, as short runs need")


@dataclass
class TrainerConfig:
    """The training loop. Keys are those of Lightning's Trainer unless they are marked as additions."""

    max_epochs: int = knob(10, "epochs", low=1, on_resume=True)
    max_steps: int = knob(-1, "updates after which the run ends early; -1 sets no limit", low=-1)
    limit_train_batches: int | float | None = knob(
        None, "batches of an epoch, as a number (int) or a fraction (float); null takes all", low=0
    )
    limit_val_batches: int | float | None = knob(None, "likewise for the validation split", low=0)
    limit_test_batches: int | float | None = knob(None, "likewise for the test split", low=0)
    accelerator: str = knob(
        "auto", "type of device", choices=("auto", "cpu", "gpu", "cuda", "mps", "tpu"), on_resume=True
    )
    devices: int | str = knob(1, "number of devices; auto takes all", low=-1, on_resume=True)
    num_nodes: int = knob(1, "number of machines", low=1, on_resume=True)
    strategy: str = knob("auto", "distribution strategy, e.g. ddp")
    precision: str = knob("32", "numeric precision", choices=("32", "bf16-mixed", "16-mixed"))
    gradient_clip_val: float | None = knob(None, "largest gradient norm; null turns clipping off", low=0.0)
    accumulate_grad_batches: int = knob(1, "forward passes per update", low=1)
    deterministic: bool = knob(False, "use deterministic kernels only; an operation that has none raises an error")
    benchmark: bool = knob(False, "let cuDNN benchmark its algorithms for the input shape")
    checkpoint_interval: float = knob(
        300.0, "seconds between two saves within an epoch; 0 saves after every update", low=0.0, finite=False, ours=True
    )
    max_loss: float = knob(
        1000.0,
        "training loss above which the run counts as diverged, as it does if the loss is not finite",
        low=0.0,
        finite=False,
        ours=True,
    )
    on_divergence: str = knob(
        "stop",
        "on divergence, end the run, or go back to the last checkpoint and continue with the other images of the epoch "
        "in another order",
        choices=("stop", "rollback"),
        ours=True,
    )
    log_every_n_steps: int = knob(50, "updates between two logged training losses", low=1)
    enable_progress_bar: bool = knob(True, "draw a progress bar if the output is a terminal", ours=True)
    compile: bool = knob(False, "compile the model with torch.compile", ours=True)
    best_metric: str = knob(
        "val/top1",
        "metric that decides which epoch checkpoints/best.ckpt holds; epoch takes the last one",
        choices=("epoch", "val/top1", "val/top5", "val/loss", "val_ema/top1", "val_ema/top5", "val_ema/loss"),
        ours=True,
    )
    slot: str = knob(
        "raw",
        "weights of model/ and of the test metrics: those being trained, or their moving average",
        choices=("raw", "ema"),
        ours=True,
    )
    early_stopping_patience: int | None = knob(
        None,
        "epochs without an improvement of best_metric after which the run ends; null never ends it",
        low=1,
        ours=True,
    )


@dataclass
class LoggerConfig:
    """Loggers besides metrics.csv, which every run writes."""

    wandb: bool = knob(False, "log to Weights & Biases: online if an API key is set, otherwise offline", on_resume=True)
    report: bool = knob(True, "write report.html, the page of the run, at its end", on_resume=True)
    tensorboard: bool = knob(False, "write TensorBoard event files into the run folder", on_resume=True)
    project: str = knob("sequencer", "W&B project", on_resume=True)
    entity: str | None = knob(None, "W&B user or team; null takes the account's default", on_resume=True)
    group: str | None = knob(
        None,
        "W&B group of the run; a sweep takes the name of its folder, and its runs are named by their trials",
        on_resume=True,
    )


@dataclass
class Config:
    """Keys of the run as a whole."""

    name: str = knob("${data.name}", "name of the run: its folder and its title in loggers")
    seed: int = knob(0, "seed of all random numbers", low=0, high=2**32 - 1)
    run_dir: str = knob("outputs/${name}/${now:%Y-%m-%d_%H-%M-%S}", "folder that the run writes to", path=True)
    init_from: str | None = knob(
        None,
        "start from the weights of a run, model folder, checkpoint or timm name; a head of other classes is replaced; "
        "of a run, model.name, model.kwargs, data.in_chans, img_size, mean and std are taken too, unless the command "
        "line says otherwise",
        path=True,
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


def lower_is_better(metric: str) -> bool:
    """Whether a lower value of `trainer.best_metric` is better."""
    return metric.endswith("loss")


def objective(best_metric: str, slot: str) -> str:
    """Returns the metric that ranks runs: `trainer.best_metric`, or for `epoch` the top-1 of `trainer.slot`."""
    last = "val_ema/top1" if slot == "ema" else "val/top1"
    return last if best_metric == "epoch" else best_metric


def lightning_settings(section: TrainerConfig) -> dict[str, Any]:
    """The keys of the section that are arguments of Lightning's Trainer, with their values."""
    return {f.name: getattr(section, f.name) for f in fields(section) if not f.metadata["ours"]}
