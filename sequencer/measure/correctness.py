"""The correctness of the fused recurrences on a device: the gate before any speed is measured."""

from collections.abc import Iterator

import torch

from sequencer.measure.contenders import layer_contenders
from sequencer.measure.contest import Case, check_outputs

MAPS = [(3, 5, 7), (1, 1, 1), (2, 16, 16)]  # batch, rows and columns
HIDDEN_SIZES = (8, 24, 48, 64, 96, 100, 128, 192)  # every set of kernels, with and without padding


def check_layers(device: torch.device, dtype: torch.dtype, backend: str) -> Iterator[tuple[str, float]]:
    """Checks our layers against the reference in float64, and that two passes agree in every bit.

    Yields:
        A hidden size, as a title, and the largest relative RMS error of outputs and gradients.

    Raises:
        RuntimeError: Outputs or gradients are wrong or not reproducible.
    """
    for D in HIDDEN_SIZES:
        contenders = layer_contenders(2 * D, D, [backend], [], False, device)
        worst = 0.0
        for B, H, W in MAPS:
            shape = (B, H, W, 2 * D)
            x = torch.randn(shape, device=device, requires_grad=True)
            case = Case(x, torch.randn(shape, device=device), dtype)
            title = f"D {D}, {B} x {H} x {W} tokens"
            try:
                errors = check_outputs(contenders, case)
            except RuntimeError as error:
                raise RuntimeError(f"{title}: {error}") from error
            worst = max(worst, *(error for error in errors.values() if error is not None))
            for contender in contenders:
                with contender.settings() as module:
                    first, second = ([t.clone() for t in case.train(module)] for _ in range(2))
                if not all(map(torch.equal, first, second)):
                    raise RuntimeError(f"{title}: {contender.name} differs from pass to pass")
        yield f"D {D}", worst
