"""The options of benchmark.py's sub-commands."""

from pathlib import Path
from typing import Any

from _cli import Parser, integer

from sequencer.names import LARGEST_IMAGE

CAPABILITIES = [80, 86, 89, 90, 100, 120]  # of the GPUs that kernels are compiled for
MODEL_PEERS = ["timm", "convnext_tiny", "swin_tiny_patch4_window7_224", "resnet50"]


def options() -> dict[str, list[Parser]]:
    """Returns the options of each sub-command by its name."""
    names: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    number: dict[str, Any] = {"type": integer(1), "metavar": "N"}
    layer_peers = _option(
        "--peer",
        **names,
        choices=("timm", "packed"),
        default=["timm"],
        help="timm, or packed: timm's layer on packed sequences; default: timm",
    )
    peers = (
        "timm: its model of the same name; packed: this model on packed sequences; or any timm model;"
        f" default: {' '.join(MODEL_PEERS)}"
    )
    which_model = [
        _option("--model", default="sequencer2d_s", metavar="NAME", help="default: sequencer2d_s"),
        _option(
            "--img-size",
            type=integer(1, LARGEST_IMAGE),
            metavar="N",
            default=224,
            help="height and width of the images; default: 224",
        ),
    ]
    backends = _option("--backend", **names, help="backends of our model; default: the automatic choice, and torch")
    backend = _option("--backend", nargs=1, metavar="NAME", help="backend of our layer; default: the automatic choice")
    batches = _option("--batch", **number | {"nargs": "+"}, default=[8], help="batch sizes; default: 8")
    batch = _option("--batch", **number, default=8, help="batch size; default: 8")
    compiled = _option("--compile", action="store_true", help="add compiled contenders")
    device = _option(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one"
    )
    modes = ("train", "inference")
    dtypes = ("float32", "bfloat16", "float16")
    setting = [
        device,
        _option(
            "--dtype", choices=dtypes, default="float32", help="float32, or the dtype of autocast; default: float32"
        ),
        _option("--mode", nargs="+", choices=modes, default=list(modes), help="default: both"),
    ]
    debug = _option("--debug", action="store_true", help="show the traceback of an error")
    passes = _option("--rounds", type=integer(2), default=10, metavar="N", help="passes of each contender; default: 10")
    contest = [
        passes,
        _option("--output", type=Path, metavar="DIR", help="default: outputs/benchmark/WHAT_TIME"),
        debug,
    ]
    epochs = _option("--rounds", type=integer(2), metavar="N", default=10, help="epochs of each; default: 10")
    seconds = _option("--seconds", **number, default=10, help="duration of each measurement; default: 10")
    overrides = _option("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of train.py that describe the run")
    capabilities = _option(
        "--capability",
        nargs="+",
        type=int,
        choices=CAPABILITIES,
        default=CAPABILITIES,
        help=f"ten times the compute capability; default: {' '.join(map(str, CAPABILITIES))}",
    )
    all_dtypes = _option(
        "--dtype", nargs="+", choices=dtypes, help="default: float32 and bfloat16, and on a GPU float16"
    )
    model_peers = _option("--peer", **names, default=MODEL_PEERS, help=peers)
    return {
        "ops": [layer_peers, backends, batches, compiled, *setting, *contest],
        "model": [*which_model, model_peers, backends, batches, compiled, *setting, *contest],
        "growth": [backend, batch, *setting, *contest],
        "export": [*which_model, backends, batches, *contest],
        "loop": [epochs, device, debug],
        "data": [overrides, seconds, device, debug],
        "kernels": [capabilities, debug],
        "all": [*which_model, batches, device, all_dtypes, *contest],
    }


def _option(name: str, **settings: Any) -> Parser:
    """A parser with one argument, for the `parents` of a sub-command."""
    parser = Parser(add_help=False)
    parser.add_argument(name, **settings)
    return parser
