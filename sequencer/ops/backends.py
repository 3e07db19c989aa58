"""The backends that compute recurrences, and the choice among them.

Shape letters: `N` sequences, `T` steps, `C` channels, `D` hidden size per direction, `K` output channels.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sequencer import names
from sequencer.ops import cpu, products, reference, torch_rnn, triton_kernels
from sequencer.ops.reference import CELLS, Layers

log = logging.getLogger("sequencer")


class Inputs(NamedTuple):
    """What a backend has to support."""

    cell: str
    hidden_size: int
    dtype: torch.dtype
    device: str  # its type, e.g. "cuda"
    requested: bool  # the backend was asked for by name


@dataclass(frozen=True)
class Backend:
    """A backend.

    Args:
        rnn: Runs recurrent layers over sequences: inputs `N T C`, the parameters of each layer and the name of a cell
            to outputs `N T K`, the forward direction first. None for the fused kernels, which run both axes of a token
            map in one launch.
        refusal: Returns why the backend does not support the inputs, or None if it does.
    """

    rnn: Callable[[Tensor, Layers, str], Tensor] | None
    refusal: Callable[[Inputs], str | None]


class Choice(NamedTuple):
    """The backend that computes a recurrence, and the reason for its choice."""

    backend: str
    reason: str


def _fused_refusal(inputs: Inputs) -> str | None:
    if inputs.cell not in cpu.CELLS:
        return _serves(cpu.CELLS)
    if inputs.device != "cpu":
        return "it runs on a CPU"
    if inputs.dtype not in cpu.DTYPES:
        return f"it has no {inputs.dtype}"
    return _warn_once(cpu.unavailable(inputs.cell, inputs.dtype))


def _triton_refusal(inputs: Inputs) -> str | None:
    """Returns why Triton's kernels do not support the inputs.

    Their slow interpreter, and kernels that are not known to be the fastest, have to be requested by name.
    """
    if inputs.cell not in triton_kernels.CELLS:
        return _serves(triton_kernels.CELLS)
    if inputs.cell not in triton_kernels.FASTEST and not inputs.requested:
        return f"its kernels of {inputs.cell} are not known to be faster than torch's"
    interpreted = inputs.device == "cpu" and inputs.requested and triton_kernels.interpreted()
    if inputs.device != "cuda" and not interpreted:
        return "it needs a GPU"
    low, high = triton_kernels.HIDDEN_SIZES
    if not low <= inputs.hidden_size <= high:
        return f"its hidden sizes are {low} to {high}"
    return f"it has no {inputs.dtype}" if inputs.dtype not in triton_kernels.DTYPES else triton_kernels.unavailable()


def _serves(cells: tuple[str, ...]) -> str:
    return f"it serves {', '.join(cells[:-1])} and {cells[-1]}"


def _torch_refusal(inputs: Inputs) -> str | None:
    return None if inputs.cell in torch_rnn.FUNCTIONS else f"it has no {inputs.cell} cell"


@functools.cache
def _warn_once(refusal: str | None) -> str | None:
    """Warns, once in a process, that the CPU kernel is not available; returns its argument."""
    if refusal is not None:
        log.warning("recurrences run on torch's slower kernels: %s", refusal)
    return refusal


BACKENDS = {  # fastest first; `auto` takes the first that supports the inputs
    "triton": Backend(None, _triton_refusal),
    "fused": Backend(None, _fused_refusal),
    "torch": Backend(torch_rnn.rnn, _torch_refusal),
    "reference": Backend(reference.rnn, lambda inputs: None),
}


def add_backend(name: str, backend: Backend) -> None:
    """Adds a backend, which is used where it is asked for by name."""
    BACKENDS[name] = backend
    if name not in names.BACKENDS:
        names.BACKENDS.append(name)
    _choose.cache_clear()


class Settings:
    """The settings of `configure`."""

    backend: str | None = None
    recompute: bool = False


def configure(backend: str | None = None, recompute: bool = False) -> None:
    """Sets the preferred backend and the memory mode of all recurrences in this process.

    Args:
        backend: `auto` or one of `BACKENDS`. Inputs that it does not support are computed by the fastest backend that
            does; see `explain`. `auto` prefers the fastest. None, the default, takes the value of the environment
            variable SEQUENCER_BACKEND, or `auto` where it is not set.
        recompute: If True, the `fused` and `triton` backends do not keep the activations of the recurrence but compute
            them again in the backward pass, which takes less memory and more time.

    Raises:
        ValueError: The backend is unknown.
    """
    if backend is not None:
        _check(backend)
    Settings.backend, Settings.recompute = backend, recompute


def explain(
    cell: str = "lstm",
    hidden_size: int = 48,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: str | None = None,
) -> Choice:
    """Returns the backend that `rnn1d` and `rnn2d` use for given inputs, and the reason.

    Args:
        cell: One of `CELLS`.
        hidden_size: Hidden size `D` per direction.
        dtype: Data type of the inputs, or that of autocast where it is enabled.
        device: Device of the inputs.
        backend: The `backend` argument of `rnn1d` and `rnn2d`. It must support the inputs, whereas a backend preferred
            by `configure` or the environment is replaced by another one where it does not.

    Raises:
        ValueError: The cell or the backend is unknown, or `backend` does not support the inputs.
    """
    found = choose(cell, hidden_size, dtype, torch.device(device).type, backend)
    if found.backend != "fused":
        return found
    return Choice("fused", f"{found.reason}; {products.describe(dtype)}")


def choose(cell: str, hidden_size: int, dtype: torch.dtype, device: str, backend: str | None) -> Choice:
    """Returns what `explain` does, without the matrix products; `device` is a type of devices."""
    preferred = Settings.backend or os.environ.get("SEQUENCER_BACKEND", "auto")
    return _choose(cell, hidden_size, dtype, device, preferred, backend)


@functools.cache
def _choose(
    cell: str, hidden_size: int, dtype: torch.dtype, device: str, preferred: str, demanded: str | None
) -> Choice:
    if cell not in CELLS:
        raise ValueError(f"unknown cell {cell!r}; there are {', '.join(CELLS)}")
    first = demanded or preferred
    _check(first)
    refusals: dict[str, str] = {}
    for candidate in dict.fromkeys([first, *BACKENDS]):
        if candidate == "auto":
            continue
        inputs = Inputs(cell, hidden_size, dtype, device, requested=candidate == first)
        refusal = BACKENDS[candidate].refusal(inputs)
        if refusal is None:
            why = "the fastest available" if first == "auto" else f"{first} was asked for"
            return Choice(candidate, "; ".join([why, *(f"{name}: {reason}" for name, reason in refusals.items())]))
        if candidate == demanded:
            raise ValueError(f"the {demanded} backend cannot serve {cell}: {refusal}")
        refusals[candidate] = refusal
    raise AssertionError("the reference backend supports all inputs")


def _check(backend: str) -> None:
    if backend not in names.BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(names.BACKENDS)}")
