"""How far back a recurrence remembers: gradients and forget gates over distance, saturated gates, and maps of states.

All of it concerns one direction of one recurrent layer, with the inputs that the layer gets in the model. The distance
k between two tokens is counted in steps of the scan. Hochreiter and Schmidhuber 1997 analyse the same gradient.

Shape letters: `B` images, `H W` token rows and columns, `C` channels, `O` sequences of an image, `N` sequences, `T`
steps, `D` hidden size, `P` probes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sequencer.analysis.attribution import axes
from sequencer.analysis.spacing import evenly_spaced
from sequencer.layers import RNN, RNN1d, RNN2d
from sequencer.ops import CELLS, Layers, Trace, Weights, rnn1d, trace

Array = NDArray[np.float64]

PROBES = 4  # for each sequence
MOST_SEQUENCES = 8  # of an image: rows or columns, evenly spaced
SATURATED = (0.1, 0.9)  # a gate below or above; the slope of a sigmoid is there less than 36% of its largest
CARRYING = ("forget", "update")  # gates that scale the state which is carried on to the next step


@dataclass
class ScanMemory:
    """What was measured of one direction of one recurrent layer, over all images and the chosen sequences."""

    module: str  # name of the token mixer in the model
    layer: int  # of stacked recurrent layers, counted from 0
    direction: str  # `down`, `up`, `right`, `left`, or `forward`, `backward`
    cell: str
    jacobian: Array  # at index k: root mean square over sequences of the Frobenius norm of dh_T/dx_(T-k)
    carried: Array | None  # at index k: mean product of the last k forget gates; None for a cell without gates
    saturated: dict[str, tuple[float, float]]  # by gate: shares below and above `SATURATED`
    maps: dict[str, Array]  # of the first image, `H W`: `hidden`, the RMS over channels, and the mean of each gate


@dataclass
class _Sums:
    """Running sums of a scan over batches."""

    cell: str
    sequences: int = 0
    squares: Any = 0.0
    carried: Any = 0.0
    saturated: dict[str, Array] = field(default_factory=dict)
    maps: dict[str, Array] = field(default_factory=dict)


def measure_memory(
    model: nn.Module, batches: Iterable[Float[Tensor, "B C0 H0 W0"]], probes: int = PROBES, seed: int = 0
) -> list[ScanMemory]:
    """Measures the memory of every scan direction of every recurrent layer in a model.

    Everything is computed in float64 from the inputs of the layers, which hooks record during a forward pass, for at
    most `MOST_SEQUENCES` rows or columns of each image. The squared norm of a Jacobian J is estimated by the mean of
    |v^T J|^2 over `probes` standard-normal vectors v for each sequence, whose expectation it is: one backward pass from
    the last step serves all distances. Memory does not grow with the number of images.

    Args:
        model: A model with `RNN1d` or `RNN2d` modules, in eval mode.
        batches: Normalised images of one size, on the device of the model.
        probes: Probes for each sequence.
        seed: Seed of the probes.

    Returns:
        One entry for each direction, in the order of the model.

    Raises:
        ValueError: The model has no recurrent layers of this package, is in training mode, or there are no images.
    """
    if not has_recurrences(model):
        raise ValueError("the model has no recurrent layers of this package")
    if model.training:
        raise ValueError("the model is in training mode; call eval() first")
    sums: dict[tuple[str, int, str], _Sums] = {}
    generator = torch.Generator().manual_seed(seed)

    def record(name: str, mixer: RNN1d | RNN2d, tokens: Tensor) -> None:
        for (layer, direction), rnn, x, w in scan_inputs(mixer, tokens):
            total = sums.setdefault((name, layer, direction), _Sums(rnn.cell))
            _add(total, x, w, probes, generator)
            if not total.maps:
                total.maps = _maps(trace(x[0], w, rnn.cell), direction, tokens.shape[1:3])

    with torch.no_grad(), recorded(model, record):
        for images in batches:
            model(images)
    if not sums:
        raise ValueError("there are no images")
    return [_result(place, total) for place, total in sums.items()]


def has_recurrences(model: nn.Module) -> bool:
    """Returns whether a model has token mixers that are recurrent layers of this package."""
    return any(isinstance(module, RNN1d | RNN2d) for module in model.modules())


@contextmanager
def recorded(model: nn.Module, record: Callable[[str, RNN1d | RNN2d, Tensor], None]) -> Iterator[None]:
    """Calls a function with the name, the module and the input `B H W C` of each recurrent token mixer that runs."""

    def call(mixer: RNN1d | RNN2d, inputs: tuple[Tensor], name: str) -> None:
        record(name, mixer, inputs[0])

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, RNN1d | RNN2d):
                stack.callback(module.register_forward_pre_hook(partial(call, name=name)).remove)
        yield


def scan_inputs(mixer: RNN1d | RNN2d, x: Tensor) -> Iterator[tuple[tuple[int, str], RNN, Tensor, Weights]]:
    """Yields layer and direction, the recurrence, its inputs `B O T C` in the order of the scan, and its weights.

    Inputs and weights are in float64.
    """
    ordered = {"forward": x.flatten(1, 2).unsqueeze(1), "down": x.transpose(1, 2), "right": x}
    for rnn, names in axes(mixer):
        tokens = ordered[names[0]].double()
        layers: Layers = [tuple(map(_to_double, directions)) for directions in rnn.weights()]
        for number, directions in enumerate(layers):
            for name, w in zip(names, directions, strict=False):
                yield (number, name), rnn, tokens.flip(2) if name == names[1] else tokens, w
            if number < len(layers) - 1:
                tokens = rnn1d(tokens.flatten(0, 1), [directions], rnn.cell).unflatten(0, tokens.shape[:2])


def chosen_sequences(x: Float[Tensor, "B O T C"]) -> Float[Tensor, "N T C"]:
    """Returns at most `MOST_SEQUENCES` evenly spaced sequences of each image."""
    return x[:, evenly_spaced(x.shape[1], MOST_SEQUENCES)].flatten(0, 1)


def _to_double(w: Weights) -> Weights:
    return Weights._make(tensor if tensor is None else tensor.detach().double() for tensor in w)


def _add(total: _Sums, x: Tensor, w: Weights, probes: int, generator: torch.Generator) -> None:
    """Adds the chosen sequences of a batch `B O T C` to the sums."""
    x = chosen_sequences(x)
    hidden_size = w.weight_hh.shape[0] // CELLS[total.cell].gates
    v = torch.randn(probes, len(x), hidden_size, generator=generator, dtype=x.dtype).to(x.device)
    squares, found = jacobian_squares(x, w, total.cell, v)
    total.sequences += len(x)
    total.squares += squares.mean(dim=0).sum(dim=0).cpu().numpy()
    carried = forget_products(found)
    total.carried = None if carried is None else total.carried + carried.mean(dim=-1).sum(dim=0).cpu().numpy()
    for name, gate in found.gates.items():
        low, high = (float(share.double().mean()) for share in (gate < SATURATED[0], gate > SATURATED[1]))
        total.saturated[name] = total.saturated.get(name, np.zeros(2)) + len(x) * np.array([low, high])


def jacobian_squares(
    x: Float[Tensor, "N T C"], w: Weights, cell: str, probes: Float[Tensor, "P N D"]
) -> tuple[Float[Tensor, "P N T"], Trace]:
    """Computes |v^T J_k|^2 for the Jacobians J_k = dh_T/dx_(T-k) of the last output of a scan.

    Summed over the unit vectors as probes it is the squared Frobenius norm of J_k; its expectation over standard-normal
    probes is the same.

    Args:
        x: Inputs in the order of the scan.
        w: The parameters of the direction.
        cell: One of `sequencer.ops.CELLS`.
        probes: The vectors v of each sequence.

    Returns:
        The values for k = 0 to T - 1, and the states and gates of the scan.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        found = trace(x, w, cell)
        (gradients,) = torch.autograd.grad(found.hidden[:, -1], x, probes, is_grads_batched=True)
    detached = {name: gate.detach() for name, gate in found.gates.items()}
    return gradients.square().sum(dim=-1).flip(-1), Trace(found.hidden.detach(), found.state.detach(), detached)


def forget_products(found: Trace) -> Float[Tensor, "N T D"] | None:
    """Computes the products of the last k forget gates of a scan, for k = 0 to T - 1.

    With all other paths of the gradient left out it is dc_T/dc_(T-k). The update gate of a GRU takes the place of the
    forget gate; the LSTM of 1997, which has none, carries its cell state on unchanged: 1. A cell without gates has no
    such product: None.
    """
    if not found.gates:
        return None
    gate = next((found.gates[name] for name in CARRYING if name in found.gates), torch.ones_like(found.hidden))
    last_first = gate.flip(1)[:, :-1]
    return torch.cat([torch.ones_like(gate[:, :1]), last_first.cumprod(dim=1)], dim=1)


def _maps(found: Trace, direction: str, size: Sequence[int]) -> dict[str, Array]:
    """Lays hidden states and gates of the sequences of one image out as the image is: `H W`."""
    values = {"hidden": found.hidden.square().mean(dim=-1).sqrt()}
    values |= {name: gate.mean(dim=-1) for name, gate in found.gates.items()}
    if direction in ("up", "left", "backward"):
        values = {name: value.flip(1) for name, value in values.items()}
    if direction in ("down", "up"):
        values = {name: value.T for name, value in values.items()}
    return {name: value.reshape(*size).cpu().numpy() for name, value in values.items()}


def _result(place: tuple[str, int, str], total: _Sums) -> ScanMemory:
    n = total.sequences
    saturated = {name: (float(low / n), float(high / n)) for name, (low, high) in total.saturated.items()}
    carried = None if total.carried is None else total.carried / n
    return ScanMemory(*place, total.cell, np.sqrt(total.squares / n), carried, saturated, total.maps)


def half_distance(curve: Array) -> float:
    """Returns the distance at which a curve over distances 0, 1, ... falls to half its first value.

    Returns:
        The distance, interpolated linearly; infinity if the curve does not fall so far, NaN if it starts at zero.
    """
    if not curve[0] > 0:
        return math.nan
    below = np.flatnonzero(curve <= curve[0] / 2)
    if not len(below):
        return math.inf
    k = int(below[0])
    return float(k - 1 + (curve[k - 1] - curve[0] / 2) / (curve[k - 1] - curve[k]))


def mean_curves(scans: Sequence[ScanMemory]) -> dict[int, tuple[Array, Array | None]]:
    """Averages the curves of scans of the same length.

    Returns:
        By number of steps, the longest first: the mean of the Jacobian norms, each divided by its value at distance 0,
        and the mean product of forget gates.
    """
    found: dict[int, tuple[Array, Array | None]] = {}
    for steps in sorted({len(scan.jacobian) for scan in scans}, reverse=True):
        same = [scan for scan in scans if len(scan.jacobian) == steps]
        curves = [scan.jacobian / scan.jacobian[0] for scan in same if scan.jacobian[0] > 0]
        carried = [scan.carried for scan in same if scan.carried is not None]
        mean = np.mean(curves, axis=0) if curves else np.full(steps, np.nan)
        found[steps] = (mean, np.mean(carried, axis=0) if carried else None)
    return found


def mean_saturation(scans: Sequence[ScanMemory]) -> dict[str, tuple[float, float]]:
    """Averages the shares of gates below and above `SATURATED` over scans, by gate."""
    names = dict.fromkeys(name for scan in scans for name in scan.saturated)
    shares = {name: [scan.saturated[name] for scan in scans if name in scan.saturated] for name in names}
    return {
        name: (float(low), float(high)) for name, (low, high) in ((n, np.mean(s, axis=0)) for n, s in shares.items())
    }


def tokens(distance: float, steps: int) -> str:
    """Formats a half-distance: `> 31` if a scan of 32 steps is too short for it."""
    return f"> {steps - 1:,}" if math.isinf(distance) else f"{distance:.1f}" if distance < 100 else f"{distance:,.0f}"
