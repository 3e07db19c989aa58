"""Trains sequencer2d_p4_32 and models of timm with as many operations an image, and measures their speed.

    python scripts/baselines.py data.root=WHERE

All have the recipe of experiment=cifar10_cpu, each with a learning rate of its own. The runs are
outputs/baselines/MODEL-SEED; a finished one is kept and an interrupted one resumed, so the same command goes on where
it was stopped. docs/results/baselines.csv has a row for each run, with its speed. Let nothing else run meanwhile.
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compare
from _cli import Parser, add_training_options, check_training_options, prepare_files, run
from _results.common import RESULTS

from sequencer.config import RequestError, compose
from sequencer.config.request import request

if TYPE_CHECKING:
    from torch import nn

RUNS = Path("outputs", "baselines")
RECIPE = "experiment=cifar10_cpu"
IMAGES_OF_64 = ["data.img_size=64", "data.augment.sizes=[32,48,64]"]  # four stages reduce an image to a 32nd
PEERS = {  # by model: what differs from the recipe; the sizes give the operations of sequencer2d_p4_32 within 4%
    "sequencer2d_p4_32": [],
    "resnet18": ["optim.lr=2e-2", *IMAGES_OF_64, "model.kwargs.channels=[48,64,96,128]"],
    "convnext_atto": [
        "optim.lr=2e-2",
        *IMAGES_OF_64,
        "model.kwargs={depths: [2, 2, 2, 2], dims: [52, 104, 208, 416], ls_init_value: 1.0}",
    ],
    "deit_tiny_patch16_224": [
        "optim.lr=5e-3",
        "model.kwargs={patch_size: 4, embed_dim: 128, depth: 4, num_heads: 4, dynamic_img_size: true}",
    ],
    # takes images of one size only: six epochs of 32 px are 1.1 times the operations of nine that begin at 16
    "mixer_p4_32": ["optim.lr=4e-2", "data.augment.sizes=null", "trainer.max_epochs=6"],
}


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PEERS), metavar="NAME,NAME", help="default: %(default)s")
    add_training_options(parser, RESULTS / "baselines.csv")
    return parser.parse_args(argv)


def work(args: Namespace) -> None:
    """Trains what is not finished, seed by seed, then measures all.

    Raises:
        RequestError: An unknown model, wrong overrides, or a folder that holds another run.
    """
    seeds = check_training_options(args, ("model.name", "seed", "run_dir"))
    names = args.models.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise RequestError(f"--models {unknown[0]}: choose from {', '.join(PEERS)}")
    wanted = [request(configure(name, seed, args.overrides)) for seed in seeds for name in names]
    prepare_files({"--output": args.output})

    from sequencer.training import run as train  # imports torch

    register_mixer()
    for each in wanted:
        train(each.config, each.resume)
    folders = [each.config.run_dir for each in wanted]
    compare.work(compare.parse([*folders, "--test", "--speed", "--output", str(args.output)]))


def configure(name: str, seed: str, overrides: list[str]) -> Any:
    return compose(
        [RECIPE, f"model.name={name}", *PEERS[name], *overrides, f"seed={seed}", f"run_dir={RUNS}/{name}-{seed}"]
    )


def register_mixer() -> None:
    """Registers an MLP-Mixer on patches of 4 pixels with timm, whose own names fix patches of 16 or 32 pixels."""
    from timm.models import build_model_with_cfg, register_model
    from timm.models.mlp_mixer import MlpMixer

    def mixer_p4_32(pretrained: bool = False, **kwargs: Any) -> "nn.Module":
        size = {"img_size": 32, "patch_size": 4, "num_blocks": 4, "embed_dim": 148}
        kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or {"input_size": (3, 32, 32), "classifier": "head"}
        return build_model_with_cfg(MlpMixer, "mixer_p4_32", pretrained, **(size | kwargs))

    register_model(mixer_p4_32)


if __name__ == "__main__":
    raise SystemExit(main())
