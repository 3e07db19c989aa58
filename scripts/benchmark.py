"""Speed and memory beside a peer, in one run, refused where the outputs differ.

    python scripts/benchmark.py ops                      # the BiLSTM2D layer beside timm's
    python scripts/benchmark.py model --batch 1 8        # sequencer2d_s beside timm's and beside other networks
    python scripts/benchmark.py growth                   # how a layer's cost grows with batch, steps and hidden size
    python scripts/benchmark.py export                   # our ONNX graph beside timm's, in onnxruntime on the CPU
    python scripts/benchmark.py loop                     # a run of ours beside a bare loop, on CIFAR-10's shapes
    python scripts/benchmark.py data data=cifar10 data.root=WHERE    # whether the loader keeps up with the model

In the first four, the gate comes first: all weights drawn at random, a random gradient from above, outputs and every
gradient compared with float64. Then all contenders take turns. `of floor` is the least time that the counted operations
or bytes allow, at the rates of a large matrix product and a large copy in the same run, over the time taken.
"""

import json
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from _cli import Parser, integer, need_onnx, pick_device, run

from sequencer.config.errors import RequestError

if TYPE_CHECKING:
    import torch

    from sequencer.measure.contest import Case, Contender

SHAPES = {"stage 1": (32, 192, 48), "stages 2-4": (16, 384, 96)}  # of sequencer2d_s at 224 px: H = W, C, D
PEERS = {"ops": ["timm"], "model": ["timm", "convnext_tiny", "swin_tiny_patch4_window7_224", "resnet50"]}
GROWTH = {"batch": (1, 2, 4, 8, 16, 32), "steps": (4, 8, 16, 32, 64), "hidden size": (8, 16, 32, 48, 64, 96, 128, 192)}


def main(argv: list[str] | None = None) -> int:
    return run(work, parse(argv))


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("ops", "model", "growth", "export", "loop", "data"))
    add("overrides", nargs="*", metavar="KEY=VALUE", help="data: the run, as train.py takes it")
    add("--peer", nargs="+", metavar="NAME", help="ops: timm, packed; model: timm or any timm model")
    add("--backend", nargs="+", metavar="NAME", help="ours; default: the fastest, and torch's kernels")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="narrow ones through autocast")
    add("--batch", nargs="+", type=integer(1), default=[8], metavar="N", help="images; default: 8")
    add("--mode", nargs="+", choices=("train", "inference"), default=["train", "inference"])
    add("--compile", action="store_true", help="add compiled contenders")
    add("--model", default="sequencer2d_s", metavar="NAME", help="model: one of ours; default: sequencer2d_s")
    add("--img-size", type=integer(1), default=224, metavar="PIXELS")
    add("--rounds", type=integer(2), default=10, metavar="N", help="passes of each contender; default: 10")
    add("--output", type=Path, metavar="DIR", help="default: outputs/benchmark/WHAT_TIME")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_intermixed_args(argv)


def work(args: Namespace) -> None:
    import torch

    from sequencer.measure import contest as benchmark

    if args.what == "export":
        check_export(args)
    if args.overrides and args.what != "data":
        raise RequestError(f"{args.overrides[0]}: only benchmark.py data takes the values of a run")
    if args.what in ("loop", "data"):
        (loop if args.what == "loop" else data)(args)
        return
    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    check(args, device, dtype)
    output = args.output or Path("outputs/benchmark") / f"{args.what}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--output {output} cannot be written: {error.strerror}") from error
    torch.manual_seed(0)
    about: dict[str, Any] = {"machine": benchmark.machine(device), "dtype": args.dtype, "arguments": vars(args).copy()}
    about["arguments"]["output"] = str(output)
    rates = benchmark.ceilings(device, dtype)
    about["ceilings"] = {"flops_per_s": rates[0], "bytes_per_s": rates[1]}
    rule = ", ".join(f"{name} {value}" for name, value in about["machine"].items())
    print(f"{rule}\n{rates[0] / 1e9:.0f} GFLOP/s in products, {rates[1] / 1e9:.1f} GB/s in copies\n")
    about["results"] = {"ops": ops, "model": model, "growth": growth, "export": export}[args.what](
        args, device, dtype, rates, output
    )
    (output / "benchmark.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"written to {output}")


def check(args: Namespace, device: "torch.device", dtype: "torch.dtype") -> None:
    import timm
    import torch

    from sequencer.measure.contest import TIMM_MODELS
    from sequencer.ops import explain

    for backend in args.backend or []:
        try:
            explain("lstm", 48, dtype, device, backend)
        except ValueError as error:
            raise RequestError(f"--backend {backend}: {error}") from error
    args.peer = args.peer or PEERS.get(args.what, [])
    for peer in args.peer:
        if args.what == "ops" and peer not in ("timm", "packed"):
            raise RequestError(f"--peer {peer}: for ops there are timm and packed")
        if args.what == "model" and peer != "timm" and not timm.is_model(peer):
            raise RequestError(f"--peer {peer}: timm has no such model")
    if args.what in ("model", "export"):
        if args.model not in TIMM_MODELS:
            raise RequestError(f"--model {args.model}: there are {', '.join(TIMM_MODELS)}")
        try:
            with torch.device("meta"):
                timm.create_model(args.model, img_size=args.img_size)
        except ValueError as error:
            raise RequestError(f"--img-size {args.img_size}: {error}") from error


def check_export(args: Namespace) -> None:
    """onnxruntime is measured on the CPU, and in inference alone."""
    if args.device == "cuda" or args.dtype != "float32" or args.mode == ["train"] or args.compile or args.peer:
        raise RequestError("export is measured on the CPU in float32 and in inference, beside timm's model and export")
    args.device, args.mode = "cpu", ["inference"]
    need_onnx()


def backends(args: Namespace, device: "torch.device", dtype: "torch.dtype") -> list[str]:
    from sequencer.ops import explain

    return args.backend or list(dict.fromkeys([explain("lstm", 48, dtype, device).backend, "torch"]))


def ops(args: Namespace, device: Any, dtype: Any, rates: tuple[float, float], output: Path) -> list[dict[str, Any]]:
    import torch

    from sequencer.measure import contest as benchmark

    records = []
    for title, (size, C, D) in SHAPES.items():
        contenders = benchmark.layer_contenders(C, D, backends(args, device, dtype), args.peer, args.compile, device)
        for B in args.batch:
            x = torch.randn(B, size, size, C, device=device, requires_grad=True)
            case = benchmark.Case(x, torch.randn(B, size, size, C, device=device), dtype)
            moved = {mode: benchmark.layer_bytes(B, size, size, C, D, mode, dtype) for mode in args.mode}
            shape = {"shape": title, "batch": B, "H": size, "W": size, "C": C, "D": D}
            heading = f"BiLSTM2D, {title}: {size} x {size} tokens, C {C}, D {D}; batch {B}, {args.dtype}"
            records += compare(args, heading, shape, contenders, case, moved, rates)
    return records


def model(args: Namespace, device: Any, dtype: Any, rates: tuple[float, float], output: Path) -> list[dict[str, Any]]:
    import torch

    from sequencer.measure import contest as benchmark

    contenders = benchmark.model_contenders(
        args.model, args.img_size, backends(args, device, dtype), args.peer, args.compile, device
    )
    records = []
    for B in args.batch:
        x = torch.randn(B, 3, args.img_size, args.img_size, device=device)
        case = benchmark.Case(x, torch.randn(B, 1000, device=device), dtype)
        heading = f"{args.model}, {args.img_size} px; batch {B}, {args.dtype}"
        records += compare(args, heading, {"batch": B}, contenders, case, dict.fromkeys(args.mode, 0), rates)
    return records


def export(args: Namespace, device: Any, dtype: Any, rates: tuple[float, float], output: Path) -> list[dict[str, Any]]:
    """timm's model, ours, and both as ONNX graphs: ours as export.py writes it, timm's as torch's exporter does."""
    from collections import Counter

    import onnx
    import torch

    from sequencer.export import describe_export, to_onnx
    from sequencer.measure import contest as benchmark
    from sequencer.models import LoadedModel, load_exported, pretrained_cfg

    contenders = benchmark.model_contenders(
        args.model, args.img_size, backends(args, device, dtype), ["timm"], False, device
    )
    timm_model, ours = contenders[0].module, contenders[1].module
    description = describe_export(
        LoadedModel(ours, args.model, "raw", None, pretrained_cfg(ours)), args.img_size, False
    )
    nodes = {}
    with TemporaryDirectory() as folder:
        for name, module, arguments in (
            ("ONNX", ours, {}),
            ("timm, ONNX", timm_model, {"replace": lambda model: None}),
        ):
            path = Path(folder, f"{len(nodes)}.onnx")
            to_onnx(module, path, description, dtype, **arguments)
            nodes[name] = dict(Counter(node.op_type for node in onnx.load(path).graph.node))
            listed = ", ".join(f"{number} {operator}" for operator, number in sorted(nodes[name].items()))
            print(f"{name}: {listed}\n")
            graph = load_exported(path)
            contenders.append(benchmark.Contender(name, graph, exact=contenders[0].exact, origin=ours))
    records = []
    for B in args.batch:
        x = torch.randn(B, 3, args.img_size, args.img_size)
        case = benchmark.Case(x, torch.randn(B, 1000), dtype)
        heading = f"{args.model}, {args.img_size} px, batch {B}, {args.dtype}"
        records += compare(args, heading, {"batch": B}, contenders, case, {"inference": 0}, rates)
    return [record | {"nodes": nodes.get(record["contender"])} for record in records]


def compare(
    args: Namespace,
    heading: str,
    shape: dict[str, Any],
    contenders: "list[Contender]",
    case: "Case",
    moved: dict[str, int],
    rates: tuple[float, float],
) -> list[dict[str, Any]]:
    """The gate, the measurements, the table.

    Raises:
        RuntimeError: a contender's outputs or gradients are wrong.
    """
    from rich.console import Console
    from rich.table import Table

    from sequencer.measure import contest as benchmark

    errors = {contender.name: benchmark.gate(contender, case) for contender in contenders}
    peers = [error for name, error in errors.items() if name.startswith("timm") and error is not None]
    limit = max(benchmark.TOLERANCES[case.dtype], 3 * max(peers, default=0.0))
    wrong = {name: error for name, error in errors.items() if error is not None and not error <= limit}
    if wrong:
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise RuntimeError(
            f"{heading}: no speed is reported, outputs or gradients are off: {listed}; limit {limit:.1e}"
        )
    table = Table(title=heading, title_justify="left")
    for column in (
        "contender",
        "mode",
        "median ms",
        "p20-p80",
        "images/s",
        "times peer",
        "of floor",
        "peak MiB",
        "error",
    ):
        table.add_column(column, justify="left" if column in ("contender", "mode") else "right")
    records = []
    for mode in args.mode:
        results = benchmark.measure(contenders, case, mode, args.rounds)
        for result in results:
            floor = max(result.flops / rates[0], moved[mode] / rates[1])
            record = shape | result.record()
            record["relative_error"] = errors[result.contender]
            record["speed_over_first"] = results[0].median / result.median
            counted = errors[result.contender] is not None  # torch miscounts the grouped convolutions of others
            record["share_of_floor"] = floor / result.median if counted else None
            records.append(record)
            error, memory = record["relative_error"], record["peak_memory_bytes"]
            table.add_row(
                result.contender,
                mode,
                f"{result.median * 1e3:.1f}",
                f"{record['p20_s'] * 1e3:.1f}-{record['p80_s'] * 1e3:.1f}",
                f"{shape['batch'] / result.median:.1f}",
                f"{record['speed_over_first']:.2f}",
                f"{record['share_of_floor']:.0%}" if counted else "",
                "" if memory is None else f"{memory / 2**20:.0f}",
                "" if error is None else f"{error:.1e}",
            )
    Console(width=140).print(table)
    return records


def loop(args: Namespace) -> None:
    """cifar10_cpu's recipe, and on a GPU that of cifar10_gpu."""
    from statistics import median

    from sequencer.config.request import compose, to_config
    from sequencer.measure import contest as benchmark
    from sequencer.measure.loop import measure_loops

    device = pick_device(args.device)
    recipe, batches = ("cifar10_gpu", 80) if device.type == "cuda" else ("cifar10_cpu", 60)
    settings = [f"experiment={recipe}", f"trainer.accelerator={device.type}", "data.num_workers=0"]
    seconds = measure_loops(to_config(compose(settings)), batches, args.rounds)
    rule = ", ".join(f"{name} {value}" for name, value in benchmark.machine(device).items())
    print(f"{rule}\n{recipe}: {batches} steps, {args.rounds} rounds by turns")
    for name, values in seconds.items():
        print(f"{name:<10} median {1e3 * median(values) / batches:.2f} ms a step")
    ratios = [ours / bare for bare, ours in zip(*seconds.values(), strict=True)]
    print(f"Lightning over the bare loop: {median(ratios):.3f} (median of {len(ratios)} pairs)")


def data(args: Namespace) -> None:
    """Both alone: on a CPU they share its cores when they run together."""
    from sequencer.config.request import compose, to_config
    from sequencer.measure import contest as benchmark
    from sequencer.measure.loop import measure_loader

    device = pick_device(args.device)
    config = to_config(compose([f"trainer.accelerator={device.type}", *args.overrides]))
    loader, model = measure_loader(config, seconds=args.rounds)
    rule = ", ".join(f"{name} {value}" for name, value in benchmark.machine(device).items())
    print(f"{rule}\n{config.data.name}, {config.data.num_workers} workers; {config.model.name}, batches of "
          f"{config.data.batch_size}")  # fmt: skip
    print(f"loader {loader:>12,.0f} images/s\nmodel  {model:>12,.0f} images/s")
    verdict = "starves the model: add workers, or store smaller images" if loader < model else "keeps up with the model"
    print(f"the loader gives {loader / model:.2f} times what the model takes: it {verdict}")


def growth(args: Namespace, device: Any, dtype: Any, rates: tuple[float, float], output: Path) -> list[dict[str, Any]]:
    """One quantity at a time, from 8 images of 16 x 16 tokens with C 384 and D 96."""
    import torch

    from sequencer.analysis import benchmark, plot_growth

    records = []
    for quantity, values in GROWTH.items():
        for value in values:
            B = value if quantity == "batch" else args.batch[0]
            T = value if quantity == "steps" else 16
            D = value if quantity == "hidden size" else 96
            C = 4 * D
            found = benchmark.layer_contenders(C, D, backends(args, device, dtype)[:1], ["timm"], False, device)
            contenders = [c for c in found if "recompute" not in c.name]
            x = torch.randn(B, T, T, C, device=device, requires_grad=True)
            case = benchmark.Case(x, torch.randn(B, T, T, C, device=device), dtype)
            heading = f"growth with {quantity}: {value} (batch {B}, {T} x {T} tokens, C {C}, D {D})"
            moved = {mode: benchmark.layer_bytes(B, T, T, C, D, mode, dtype) for mode in args.mode}
            shape = {"quantity": quantity, "value": value, "batch": B, "H": T, "W": T, "C": C, "D": D}
            records += compare(args, heading, shape, contenders, case, moved, rates)
    plot_growth(records, output / "growth.png")
    return records


if __name__ == "__main__":
    raise SystemExit(main())
