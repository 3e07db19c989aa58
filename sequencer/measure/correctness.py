"""The correctness of the fused recurrences on a device: the gate before any speed is measured."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from sequencer.measure.contenders import Contender, layer_contenders
from sequencer.measure.contest import TOLERANCES, Case, relative_error

MAPS = [(3, 5, 7), (1, 1, 1), (2, 16, 16)]  # batch, rows and columns
HIDDEN_SIZES = (8, 24, 48, 64, 96, 100, 128, 192)  # every set of kernels, with and without padding


def check_layers(device: torch.device, dtype: torch.dtype, backend: str) -> Iterator[tuple[int, float]]:
    """Checks our layers against the reference in float64, and that two passes agree in every bit.

    Yields:
        A hidden size, and the largest relative RMS error of outputs and gradients.

    Raises:
        RuntimeError: Outputs or gradients are wrong or not reproducible.
    """
    for D in HIDDEN_SIZES:
        found = layer_contenders(2 * D, D, [backend, "reference"], [], False, device)
        contenders = [contender for contender in found if contender.backend == backend]
        reference = next(contender for contender in found if contender.backend == "reference")
        errors = []
        for B, H, W in MAPS:
            x = torch.randn(B, H, W, 2 * D, device=device, requires_grad=True)
            case = Case(x, torch.randn(B, H, W, 2 * D, device=device), dtype)
            plain = relative_error(reference, replace(case, dtype=torch.float32))
            assert plain is not None
            limit = max(TOLERANCES[dtype], 3 * plain)
            for contender in contenders:
                title = f"D {D}, {B} x {H} x {W} tokens: {contender.name}"
                errors.append(_check(contender, case, limit, title))
        yield D, max(errors)


def _check(contender: Contender, case: Case, limit: float, title: str) -> float:
    """Returns the error of a contender."""
    error = relative_error(contender, case)
    assert error is not None
    if not error <= limit:
        raise RuntimeError(f"{title}: outputs or gradients are wrong by {error:.1e}; limit {limit:.1e}")
    with contender.settings() as module:
        first, second = ([tensor.clone() for tensor in case.train(module)] for _ in range(2))
    if not all(map(torch.equal, first, second)):
        raise RuntimeError(f"{title} differs from pass to pass")
    return error
