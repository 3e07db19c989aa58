"""Exports a trained model to a format that runs without this project, and checks it against the original.

    python scripts/export.py outputs/digits/2026-01-31_12-00-00 --format onnx --output digits_onnx
    python scripts/export.py RUN --format hub --output FOLDER --push-to ORG/NAME

Formats: `onnx` (model.onnx, for onnxruntime and others), `torch_export` (model.pt2, for torch.export.load), `hub` (a
folder that timm loads, with a model card), `timm` (model.safetensors) and `paper` (model.pth, the keys of the paper's
repository). Graphs take any batch of images of one size. Each export comes with certificate.json: the differences of
its outputs from the model's on real images, in batches of 1, 3 and 8. An export with too large differences is not kept.
"""

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import (
    Parser,
    add_model_options,
    import_torch,
    integer,
    load_original,
    named_model,
    need_packages,
    prepared,
    run,
)

from sequencer.config.errors import RequestError
from sequencer.files import write_json
from sequencer.names import EXPORTED_GRAPHS, EXPORTED_WEIGHTS, LARGEST_IMAGE
from sequencer.printing import printable

if TYPE_CHECKING:
    from sequencer.models import LoadedModel


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, model folder, checkpoint file or timm name")
    add("--format", choices=(*EXPORTED_GRAPHS, *EXPORTED_WEIGHTS), required=True)
    add("--output", metavar="DIR", type=Path, required=True, help="folder for the export and its certificate")
    add(
        "--img-size",
        metavar="N",
        type=integer(1, LARGEST_IMAGE),
        help="height and width of a graph's images; default: the model's",
    )
    add(
        "--dtype",
        choices=("fp32", "fp16"),
        default="fp32",
        help="dtype of a graph's weights; its inputs and outputs are float32",
    )
    add("--with-preprocessing", action="store_true", help="graph: uint8 B H W C images in, probabilities out")
    add_model_options(parser)
    add(
        "--push-to",
        metavar="ORG/NAME",
        help="hub: upload to this repository, with the token of `hf auth login` or HF_TOKEN",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.format not in EXPORTED_GRAPHS and (args.img_size or args.dtype != "fp32" or args.with_preprocessing):
        parser.error("--img-size, --dtype and --with-preprocessing are for --format onnx and torch_export")
    if args.push_to and args.format != "hub":
        parser.error("--push-to is for --format hub")
    return args


def work(args: Namespace) -> None:
    args.model = named_model(args.model, args)
    import_torch()
    from sequencer.export import export_graph, export_weights, loads_with_timm, push

    if args.format == "onnx":
        need_packages("ONNX", "onnx", "onnxruntime", "onnxscript")
    loaded = load_original(args.model, args)
    img_size = args.img_size or loaded.pretrained_cfg["input_size"][-1]
    check(loaded, img_size, args)
    with prepared(args.output) as folder:
        if args.format in EXPORTED_GRAPHS:
            result = export_graph(loaded, folder, args.format, img_size, args.dtype, args.with_preprocessing)
        else:
            names = [f"hf-hub:{args.push_to}"] if args.push_to else []
            result = export_weights(loaded, folder, args.format, *names)
        certificate = {"model": args.model, "format": args.format} | result
        write_json(folder / "certificate.json", certificate)
    show(certificate, args.output)
    if args.format in ("hub", "timm"):
        print("it loads with timm alone" if loads_with_timm(loaded) else "timm loads it only after `import sequencer`")
    if args.push_to:
        print(f"pushed to {push(args.output, args.push_to)}")


def check(loaded: "LoadedModel", img_size: int, args: Namespace) -> None:
    from sequencer.evaluation import check_img_size
    from sequencer.models import Sequencer

    if args.format == "paper" and not isinstance(loaded.model, Sequencer):
        raise RequestError(f"{loaded.arch} does not exist in the paper's repository; use --format timm")
    if args.push_to:
        check_hub(args.push_to)
    check_img_size(loaded, img_size)


def check_hub(repo_id: str) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RequestError(f"--push-to {repo_id}: {error}") from error
    if get_token() is None:
        raise RequestError("--push-to needs a token of the hub: run hf auth login, or set HF_TOKEN")


def show(certificate: dict[str, Any], output: Path) -> None:
    print(f"{printable(output / certificate['file'])}: {certificate['bytes'] / 2**20:.1f} MiB")
    print(
        "{outputs} differ by at most {max_error:.1e}, the largest is {largest_output:.3g}; top-1 classes agree for"
        " {top1_agreement:.0%} of the images ({images})".format(**certificate)
    )


if __name__ == "__main__":
    raise SystemExit(main())
