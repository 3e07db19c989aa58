"""Peak rates of the machine, by which the least time of a computation is known."""

import torch
from torch import Tensor

from sequencer.machine import timed
from sequencer.ops import products

ROUNDS = 8


def peak_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of the fastest matrix product, and bytes/s of a large copy (read and written).

    On a CPU it is the fastest of all products that `sequencer.ops.products` knows in `dtype`, for a square and for the
    shapes of sequencer2d_s.
    """
    source = torch.zeros(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.zeros_like(source)
    copies = [timed(lambda: target.copy_(source), device) for _ in range(ROUNDS)]
    if device.type == "cuda":
        rate = _rate("torch", (8192,) * 3, device, dtype)
    else:
        shapes = ((2048,) * 3, *products.SHAPES)
        rate = max(_rate(name, shape, device, dtype) for name in products.candidates(dtype) for shape in shapes)
    return rate, 2 * source.nbytes / min(copies)


def _rate(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one product `[M, K] x [K, N]`."""
    M, K, N = shape
    a, b = torch.randn(M, K, device=device, dtype=dtype), torch.randn(N, K, device=device, dtype=dtype)

    def multiply() -> Tensor:
        return products.PRODUCTS[name](a, b, None)

    with torch.inference_mode():
        return 2 * M * K * N / min(timed(multiply, device) for _ in range(ROUNDS))
