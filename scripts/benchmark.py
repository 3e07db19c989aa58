"""Measures speed and memory in comparison with peers; reports no speed if the outputs differ.

    python scripts/benchmark.py ops                      # the BiLSTM2D layer and timm's
    python scripts/benchmark.py model --batch 1 8        # sequencer2d_s, timm's, and other networks
    python scripts/benchmark.py growth                   # cost of a layer by batch, steps and hidden size
    python scripts/benchmark.py export --batch 1 8       # our ONNX graph and timm's, in onnxruntime on the CPU
    python scripts/benchmark.py loop --rounds 10         # a run of ours and a bare loop, on CIFAR-10's shapes
    python scripts/benchmark.py data data=cifar10 data.root=WHERE    # the loader and the model
    python scripts/benchmark.py kernels                  # the GPU kernels' machine code; needs no GPU
    python scripts/benchmark.py all --device cuda        # a page: correctness, ops, model, growth and loop

`benchmark.py WHAT --help` lists the options of each. `ops`, `model`, `growth`, `export` and `all` check the outputs
first: weights and the gradient of the output are drawn at random, and the outputs and every gradient are compared with
float64. Then all contenders take turns. `of floor` is the least time that the operations or bytes need, at the rates of
the fastest matrix product and a large copy in the same run, divided by the measured time.
"""

import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from _benchmark_options import options
from _cli import Parser, created, need_packages, pick_device, run
from rich.console import Console
from rich.table import Table

from sequencer.config import compose
from sequencer.files import write_json
from sequencer.printing import printable

if TYPE_CHECKING:
    import torch

    from sequencer.measure import Comparison, Settings

LOOPS = {"cpu": ("cifar10_cpu", 20), "cuda": ("cifar10_gpu", 80)}  # recipe and batches per epoch
KERNEL_COLUMNS = (
    "layer",
    "kernel",
    "tile/warps/stages",
    "registers",
    "shared",
    "programs",
    "MMA",
    "loop",
    "barriers",
    "copies",
    "faults",
)
COLUMNS = ("contender", "mode", "median ms", "p20-p80", "images/s", "times peer", "of floor", "peak MiB", "error")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run(args.work, args)


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, parents in options().items():
        work, text = MEASUREMENTS[name]
        command = commands.add_parser(name, help=text, description=f"Measures {text}.", parents=parents)
        command.set_defaults(work=work)
    commands.choices["export"].set_defaults(device="cpu", dtype="float32", mode=["inference"])
    args, unknown = parser.parse_known_args(argv)
    if args.what == "data":  # argparse takes only the positional arguments before the first option
        args.overrides += [argument for argument in unknown if not argument.startswith("-")]
        unknown = [argument for argument in unknown if argument.startswith("-")]
    if unknown:
        commands.choices[args.what].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


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


def kernels(args: Namespace) -> int:
    need_packages("the check of the kernels", "triton")
    from sequencer.measure.kernel_check import ALL_LAYERS, check_kernels

    faults = 0
    for capability in args.capability:
        found = Table(*KERNEL_COLUMNS, title=f"sm_{capability}", title_justify="left")
        for layer in ALL_LAYERS:
            for kernel in check_kernels(capability, layer):
                found.add_row(layer.title, *map(str, kernel.row()), ", ".join(kernel.faults) or "none")
                faults += len(kernel.faults)
        Console(width=160).print(found)
    print(f"{faults} faults")
    return 1 if faults else 0


def everything(args: Namespace) -> int:
    from sequencer.measure import Page

    device = pick_device(args.device)
    narrow = ["bfloat16", "float16"] if device.type == "cuda" else ["bfloat16"]
    dtypes, batches = args.dtype or ["float32", *narrow], list(map(str, args.batch))
    output = args.output or Path("outputs/benchmark") / f"all_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    common = ["--device", device.type, "--rounds", str(args.rounds)]
    sized = ["--model", args.model, "--img-size", str(args.img_size), "--batch", *batches]
    with created(output):
        page = Page(output / "performance.md", print_machine(device))
        page.check(device, dtypes)
        for dtype in dtypes:
            of_dtype = [*common, "--dtype", dtype, "--compile"]
            for what, options in (("ops", ["--batch", *batches]), ("model", sized)):
                folder = output / f"{what}_{dtype}"
                work = [what, *options, *of_dtype, "--peer", "timm", "packed", "--output", str(folder)]
                page.measure(f"{what}, {dtype}", work, main, folder)
        growth = output / "growth"
        page.measure("growth", ["growth", *common, "--dtype", dtypes[-1], "--output", str(growth)], main, growth)
        page.measure("loop", ["loop", *common], main)
    print(f"written to {printable(output)}")
    return 1 if page.failures else 0


MEASUREMENTS: dict[str, tuple[Callable[[Namespace], int | None], str]] = {
    "ops": (ops, "the BiLSTM2D layer and timm's"),
    "model": (model, "a model, timm's, and others"),
    "growth": (growth, "the cost of a layer by batch, steps and hidden size"),
    "export": (export, "our ONNX graph and timm's, in onnxruntime on the CPU"),
    "loop": (loop, "a run of cifar10_cpu (on a GPU cifar10_gpu) and a bare loop, on noise"),
    "data": (data, "the loader of a run and its model, each alone"),
    "kernels": (kernels, "the machine code of the GPU kernels, compiled without a GPU"),
    "all": (everything, "all that concerns a device, after a check of correctness, and writes a page"),
}


if __name__ == "__main__":
    raise SystemExit(main())
