"""Comparisons with peers: the BiLSTM2D layer, its growth with the shapes, whole models, and their ONNX graphs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sequencer.measure.contenders import Contender, export_contenders, layer_contenders, model_contenders
from sequencer.measure.contest import Case, Mode, check_outputs, compile_failures, measure

SHAPES = {"stage 1": (32, 192, 48), "stages 2-4": (16, 384, 96)}  # of sequencer2d_s at 224 px: H = W, C, D
GROWTH = {"batch": (1, 2, 4, 8, 16, 32), "steps": (4, 8, 16, 32, 64), "hidden size": (8, 16, 32, 48, 64, 96, 128, 192)}


@dataclass(frozen=True)
class Settings:
    """How contenders are measured.

    Attributes:
        device: Where they run.
        dtype: float32, or the dtype of autocast.
        modes: train, inference or both.
        rounds: Passes of every contender.
        flop_rate: FLOP/s of a large matrix product on the machine.
        byte_rate: bytes/s of a large copy on the machine.
    """

    device: torch.device
    dtype: torch.dtype
    modes: Sequence[Mode]
    rounds: int
    flop_rate: float
    byte_rate: float


@dataclass(frozen=True)
class Comparison:
    """One table: its title, a record for every contender and mode, and why some contenders do not compile, by name."""

    title: str
    records: list[dict[str, Any]]
    failures: dict[str, str]


def compare_layers(
    settings: Settings, batches: Sequence[int], backends: Sequence[str], peers: Sequence[str], compiled: bool
) -> Iterator[Comparison]:
    """Compares BiLSTM2D layers with the shapes of sequencer2d_s, for every shape and batch size.

    Raises:
        RuntimeError: Outputs or gradients of a contender are wrong.
    """
    for shape, (size, C, D) in SHAPES.items():
        contenders = layer_contenders(C, D, backends, peers, compiled, settings.device)
        for B in batches:
            title = f"BiLSTM2D, {shape}: {size} x {size} tokens, C {C}, D {D}; batch {B}, {_name(settings.dtype)}"
            yield _compare_layer(settings, title, {"shape": shape}, contenders, B, size, C, D)


def compare_growth(settings: Settings, batch: int, backend: str) -> Iterator[Comparison]:
    """Compares layers while one quantity changes, starting from `batch` images of 16 x 16 tokens, C 384 and D 96.

    Raises:
        RuntimeError: Outputs or gradients of a contender are wrong.
    """
    for quantity, values in GROWTH.items():
        for value in values:
            B = value if quantity == "batch" else batch
            T = value if quantity == "steps" else 16
            D = value if quantity == "hidden size" else 96
            C = 4 * D
            contenders = layer_contenders(C, D, [backend], ["timm"], False, settings.device)
            contenders = [c for c in contenders if not c.recompute and not c.name.startswith("gru")]
            title = f"growth with {quantity}: {value} (batch {B}, {T} x {T} tokens, C {C}, D {D})"
            yield _compare_layer(settings, title, {"quantity": quantity, "value": value}, contenders, B, T, C, D)


def compare_models(
    settings: Settings,
    name: str,
    img_size: int,
    batches: Sequence[int],
    backends: Sequence[str],
    peers: Sequence[str],
    compiled: bool,
) -> Iterator[Comparison]:
    """Compares a model with its peers, for every batch size.

    Raises:
        RuntimeError: Outputs or gradients of a contender are wrong.
    """
    contenders = model_contenders(name, backends, peers, compiled, settings.device)
    yield from _compare_images(settings, name, img_size, batches, contenders)


def compare_exports(
    settings: Settings, name: str, img_size: int, batches: Sequence[int], backends: Sequence[str]
) -> Iterator[Comparison]:
    """Compares a model and timm's with their ONNX graphs, in inference on the CPU, for every batch size.

    The records of the graphs have their number of nodes by operator under `nodes`.

    Raises:
        RuntimeError: Outputs of a contender are wrong.
    """
    contenders, nodes = export_contenders(name, img_size, backends)
    for comparison in _compare_images(settings, name, img_size, batches, contenders):
        records = [record | {"nodes": nodes.get(record["contender"])} for record in comparison.records]
        yield replace(comparison, records=records)


def compare(
    settings: Settings,
    title: str,
    shape: dict[str, Any],
    contenders: Sequence[Contender],
    case: Case,
    least_bytes: dict[Mode, int],
) -> Comparison:
    """Checks the contenders, then measures those that run in every mode.

    A record holds `shape`, the measurements, `relative_error`, `speed_over_first` (the speed of the contender divided
    by that of the first) and `share_of_floor`: the least time that the operations or `least_bytes` need at the peak
    rates of the machine, divided by the measured time.

    Raises:
        RuntimeError: Outputs or gradients of a contender are wrong.
    """
    failures = compile_failures(contenders, case)
    contenders = [contender for contender in contenders if contender.name not in failures]
    try:
        errors = check_outputs(contenders, case)
    except RuntimeError as error:
        raise RuntimeError(f"{title}: {error}") from error
    records = []
    for mode in settings.modes:
        results = measure(contenders, case, mode, settings.rounds)
        for result in results:
            floor = max(result.flops / settings.flop_rate, least_bytes.get(mode, 0) / settings.byte_rate)
            deviation = errors[result.contender]
            ratios = {
                "relative_error": deviation,
                "speed_over_first": results[0].median / result.median,
                # torch counts the grouped convolutions of other networks wrongly
                "share_of_floor": None if deviation is None else floor / result.median,
            }
            records.append(shape | result.record() | ratios)
    return Comparison(title, records, failures)


def layer_bytes(B: int, H: int, W: int, C: int, D: int, mode: Mode, dtype: torch.dtype) -> int:
    """The least bytes that a BiLSTM2D layer moves; the weights are left out, since they are few.

    In inference it reads the input, writes and reads the hidden states, and writes the output. In training it also
    writes and reads gates and cells, and moves the gradients of the input, the hidden states and the output.
    """
    size = torch.finfo(dtype).bits // 8
    tokens = B * H * W
    elements = 2 * C + 2 * 4 * D if mode == "inference" else 5 * C + 2 * (16 + 4) * D + 4 * 4 * D
    return tokens * elements * size


def _compare_layer(
    settings: Settings,
    title: str,
    entries: dict[str, Any],
    contenders: Sequence[Contender],
    B: int,
    T: int,
    C: int,
    D: int,
) -> Comparison:
    x = torch.randn(B, T, T, C, device=settings.device, requires_grad=True)
    case = Case(x, torch.randn(B, T, T, C, device=settings.device), settings.dtype)
    least_bytes = {mode: layer_bytes(B, T, T, C, D, mode, settings.dtype) for mode in settings.modes}
    shape = entries | {"batch": B, "H": T, "W": T, "C": C, "D": D}
    return compare(settings, title, shape, contenders, case, least_bytes)


def _compare_images(
    settings: Settings, name: str, img_size: int, batches: Sequence[int], contenders: Sequence[Contender]
) -> Iterator[Comparison]:
    for B in batches:
        x = torch.randn(B, 3, img_size, img_size, device=settings.device)
        case = Case(x, torch.randn(B, 1000, device=settings.device), settings.dtype)
        title = f"{name}, {img_size} px; batch {B}, {_name(settings.dtype)}"
        yield compare(settings, title, {"batch": B}, contenders, case, {})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
