"""Measures speed and memory in comparison with peers; reports no speed if the outputs differ.

    python scripts/benchmark.py ops                      # the BiLSTM2D layer and timm's
    python scripts/benchmark.py model --batch 1 8        # sequencer2d_s, timm's, and other networks
    python scripts/benchmark.py growth                   # cost of a layer by batch, steps and hidden size
    python scripts/benchmark.py export --batch 1 8       # our ONNX graph and timm's, in onnxruntime on the CPU
    python scripts/benchmark.py loop --rounds 10         # a run of ours and a bare loop, on CIFAR-10's shapes
    python scripts/benchmark.py data data=cifar10 data.root=WHERE    # the loader and the model

`benchmark.py WHAT --help` lists the options of each. The first four check the outputs first: weights and the gradient
of the output are drawn at random, and the outputs and every gradient are compared with float64. Then all contenders
take turns. `of floor` is the least time that the operations or bytes need, at the rates of the fastest matrix product
and a large copy in the same run, divided by the measured time.
"""

import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from _cli import Parser, created, integer, need_packages, pick_device, run
from rich.console import Console
from rich.table import Table

from sequencer.config import compose
from sequencer.files import write_json
from sequencer.names import LARGEST_IMAGE
from sequencer.printing import printable

if TYPE_CHECKING:
    import torch

    from sequencer.measure import Comparison, Settings

MODEL_PEERS = ["timm", "convnext_tiny", "swin_tiny_patch4_window7_224", "resnet50"]
LOOPS = {"cpu": ("cifar10_cpu", 60), "cuda": ("cifar10_gpu", 80)}  # recipe and batches per epoch
COLUMNS = ("contender", "mode", "median ms", "p20-p80", "images/s", "times peer", "of floor", "peak MiB", "error")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run(args.work, args)


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for work, text, options in measurements():
        command = commands.add_parser(work.__name__, help=text, description=f"Measures {text}.", parents=options)
        command.set_defaults(work=work)
    commands.choices["export"].set_defaults(device="cpu", dtype="float32", mode=["inference"])
    args, unknown = parser.parse_known_args(argv)
    if args.what == "data":  # argparse takes only the positional arguments before the first option
        args.overrides += [argument for argument in unknown if not argument.startswith("-")]
        unknown = [argument for argument in unknown if argument.startswith("-")]
    if unknown:
        commands.choices[args.what].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def measurements() -> list[tuple[Callable[[Namespace], None], str, list[Parser]]]:
    """What can be measured: the function, which names the sub-command, a description, and the options."""
    names: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    number: dict[str, Any] = {"type": integer(1), "metavar": "N"}
    layer_peers = option(
        "--peer",
        **names,
        choices=("timm", "packed"),
        default=["timm"],
        help="timm, or packed: timm's layer on packed sequences; default: timm",
    )
    peers = f"timm: its model of the same name; or any timm model; default: {' '.join(MODEL_PEERS)}"
    which_model = [
        option("--model", default="sequencer2d_s", metavar="NAME", help="default: sequencer2d_s"),
        option(
            "--img-size",
            type=integer(1, LARGEST_IMAGE),
            metavar="N",
            default=224,
            help="height and width of the images; default: 224",
        ),
    ]
    backends = option("--backend", **names, help="backends of our model; default: the automatic choice, and torch")
    backend = option("--backend", nargs=1, metavar="NAME", help="backend of our layer; default: the automatic choice")
    batches = option("--batch", **number | {"nargs": "+"}, default=[8], help="batch sizes; default: 8")
    batch = option("--batch", **number, default=8, help="batch size; default: 8")
    compiled = option("--compile", action="store_true", help="add compiled contenders")
    device = option(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one"
    )
    modes = ("train", "inference")
    dtypes = ("float32", "bfloat16", "float16")
    setting = [
        device,
        option(
            "--dtype", choices=dtypes, default="float32", help="float32, or the dtype of autocast; default: float32"
        ),
        option("--mode", nargs="+", choices=modes, default=list(modes), help="default: both"),
    ]
    debug = option("--debug", action="store_true", help="show the traceback of an error")
    passes = option("--rounds", type=integer(2), default=10, metavar="N", help="passes of each contender; default: 10")
    contest = [passes, option("--output", type=Path, metavar="DIR", help="default: outputs/benchmark/WHAT_TIME"), debug]
    epochs = option("--rounds", type=integer(2), metavar="N", default=10, help="epochs of each; default: 10")
    seconds = option("--seconds", **number, default=10, help="duration of each measurement; default: 10")
    overrides = option("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of train.py that describe the run")
    model_peers = option("--peer", **names, default=MODEL_PEERS, help=peers)
    return [
        (ops, "the BiLSTM2D layer and timm's", [layer_peers, backends, batches, compiled, *setting, *contest]),
        (
            model,
            "a model, timm's, and others",
            [*which_model, model_peers, backends, batches, compiled, *setting, *contest],
        ),
        (growth, "the cost of a layer by batch, steps and hidden size", [backend, batch, *setting, *contest]),
        (export, "our ONNX graph and timm's, in onnxruntime on the CPU", [*which_model, backends, batches, *contest]),
        (loop, "a run of cifar10_cpu (on a GPU cifar10_gpu) and a bare loop, on noise", [epochs, device, debug]),
        (data, "the loader of a run and its model, each alone", [overrides, seconds, device, debug]),
    ]


def option(name: str, **settings: Any) -> Parser:
    """A parser with one argument, for the `parents` of a sub-command."""
    parser = Parser(add_help=False)
    parser.add_argument(name, **settings)
    return parser


def ops(args: Namespace) -> None:
    from sequencer.measure import compare_layers

    contest(args, lambda settings, backends: compare_layers(settings, args.batch, backends, args.peer, args.compile))


def model(args: Namespace) -> None:
    from sequencer.measure import check_model, check_peers, compare_models

    check_peers(args.peer)
    check_model(args.model, args.img_size)
    shape = (args.model, args.img_size, args.batch)
    contest(args, lambda settings, backends: compare_models(settings, *shape, backends, args.peer, args.compile))


def growth(args: Namespace) -> None:
    from sequencer.analysis import plot_growth
    from sequencer.measure import compare_growth

    output, records = contest(args, lambda settings, backends: compare_growth(settings, args.batch, backends[0]))
    plot_growth(records, output / "growth.png")


def export(args: Namespace) -> None:
    need_packages("ONNX", "onnx", "onnxruntime", "onnxscript")
    from sequencer.measure import check_model, compare_exports

    check_model(args.model, args.img_size)
    shape = (args.model, args.img_size, args.batch)
    _, records = contest(args, lambda settings, backends: compare_exports(settings, *shape, backends))
    for name, nodes in {record["contender"]: record["nodes"] for record in records if record["nodes"]}.items():
        print(f"{name}: {', '.join(f'{number} {operator}' for operator, number in sorted(nodes.items()))}")


def contest(
    args: Namespace, compare: "Callable[[Settings, list[str]], Iterable[Comparison]]"
) -> tuple[Path, list[dict[str, Any]]]:
    """Prints a table of each comparison and writes benchmark.json; returns its folder and the records."""
    import torch

    from sequencer.measure import Settings, choose_backends, peak_rates

    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    backends = choose_backends(args.backend, device, dtype)
    output = args.output or Path("outputs/benchmark") / f"{args.what}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    with created(output):
        torch.manual_seed(0)
        machine = print_machine(device)
        flop_rate, byte_rate = peak_rates(device, dtype)
        print(f"{flop_rate / 1e9:.0f} GFLOP/s in matrix products, {byte_rate / 1e9:.1f} GB/s in copies\n")
        records: list[dict[str, Any]] = []
        failures: dict[str, dict[str, str]] = {}
        for comparison in compare(Settings(device, dtype, args.mode, args.rounds, flop_rate, byte_rate), backends):
            Console(width=140).print(table(comparison))
            for name, reason in comparison.failures.items():
                print(f"{name} does not compile: {reason}")
            records += comparison.records
            failures |= {comparison.title: comparison.failures} if comparison.failures else {}
        arguments = {name: value for name, value in vars(args).items() if name != "work"} | {"output": str(output)}
        about = {"machine": machine, "dtype": args.dtype, "arguments": arguments}
        about |= {
            "ceilings": {"flops_per_s": flop_rate, "bytes_per_s": byte_rate},
            "results": records,
            "failures": failures,
        }
        write_json(output / "benchmark.json", about)
    print(f"written to {printable(output)}")
    return output, records


def table(comparison: "Comparison") -> Table:
    found = Table(title=comparison.title, title_justify="left")
    for column in COLUMNS:
        found.add_column(column, justify="left" if column in ("contender", "mode") else "right")
    for record in comparison.records:
        memory, error, floor = (record[key] for key in ("peak_memory_bytes", "relative_error", "share_of_floor"))
        found.add_row(
            record["contender"],
            record["mode"],
            f"{record['median_s'] * 1e3:.1f}",
            f"{record['p20_s'] * 1e3:.1f}-{record['p80_s'] * 1e3:.1f}",
            f"{record['batch'] / record['median_s']:.1f}",
            f"{record['speed_over_first']:.2f}",
            "" if floor is None else f"{floor:.0%}",
            "" if memory is None else f"{memory / 2**20:.0f}",
            "" if error is None else f"{error:.1e}",
        )
    for name in comparison.failures:
        found.add_row(name, "does not compile")
    return found


def print_machine(device: "torch.device") -> dict[str, Any]:
    from sequencer.measure import describe_machine

    machine = describe_machine(device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    return machine


def loop(args: Namespace) -> None:
    from sequencer.measure import measure_loops

    device = pick_device(args.device)
    recipe, batches = LOOPS[device.type]
    overrides = [f"experiment={recipe}", f"trainer.accelerator={device.type}", "data.num_workers=0"]
    seconds = measure_loops(compose(overrides), batches, args.rounds)
    print_machine(device)
    print(f"{recipe}: {batches} steps per round, {args.rounds} rounds in turns")
    for name, values in seconds.items():
        print(f"{name:<10} median {1e3 * median(values) / batches:.2f} ms per step")
    ratios = [ours / bare for bare, ours in zip(*seconds.values(), strict=True)]
    print(f"time of Lightning / time of the bare loop: {median(ratios):.3f} (median of {len(ratios)} pairs)")


def data(args: Namespace) -> None:
    from sequencer.measure import measure_loader

    device = pick_device(args.device)
    config = compose([f"trainer.accelerator={device.type}", *args.overrides])
    loader, model = measure_loader(config, args.seconds)
    print_machine(device)
    print(
        f"{config.data.name}, {config.data.num_workers} workers; {config.model.name}, batches of"
        f" {config.data.batch_size}"
    )
    print(f"loader {loader:>12,.0f} images/s\nmodel  {model:>12,.0f} images/s")
    verdict = "starves the model: add workers, or store smaller images" if loader < model else "keeps up with the model"
    print(f"the loader is {loader / model:.2f} times as fast as the model: it {verdict}")


if __name__ == "__main__":
    raise SystemExit(main())
