"""Linear layers on a CPU, by the fastest matrix products of this machine.

In eager mode torch multiplies float32 by MKL. oneDNN, which is faster on some processors, is reached by the operator to
which torch.compile lowers linear layers; it has no derivative of its own. Where a processor has no instructions for
bfloat16, torch's products of it are slower than those of float32.

Which product serves the outputs, the gradients of inputs and those of weights is measured once, and kept in the cache
folder of the compiled kernels, one file for each processor, version of torch, number of threads and dtype. All
processes read the choice of the first, so that a resumed run computes the same bits. Where no file can be kept, nothing
is measured: torch's products are used.

Shape letters: `M` tokens, `K` input channels, `N` output channels.
"""

import contextlib
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry, register_flop_formula

from sequencer.files import to_json
from sequencer.ops.cache import cache_folder, digest
from sequencer.ops.reference import autocast_dtype
from sequencer.processor import processor_name

SHAPES = ((4096, 192, 768), (2048, 384, 1152))  # M, K, N, of sequencer2d_s
ROUNDS = 8  # of every product, after one that is not counted
GAIN = 1.05  # least gain for which torch's product is left
SMALLEST = 2**20  # multiplications of the smallest product that gains by a choice


class Choice(NamedTuple):
    """The products, by name, of the outputs and of the gradients of inputs and weights."""

    outputs: str
    inputs: str
    weights: str


DEFAULT = Choice("torch", "torch", "torch")
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _by_torch(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _in_float32(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return _by_torch(a.float(), b.float(), bias if bias is None else bias.float()).to(a.dtype)


PRODUCTS: dict[str, Product] = {"torch": _by_torch, "onednn": _by_onednn, "float32": _in_float32}  # a b^T + bias
NAMES = {"torch": "torch", "onednn": "oneDNN", "float32": "torch in float32"}


def candidates(dtype: torch.dtype) -> list[str]:
    """Returns the names of the products of a dtype that exist here; torch's is the first."""
    if dtype == torch.bfloat16:
        return ["torch", "float32"]
    if dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return ["torch"]
    return ["torch", "onednn"] if hasattr(torch.ops.mkldnn, "_linear_pointwise") else ["torch"]


def choice(dtype: torch.dtype) -> Choice:
    """Returns the products of a dtype, for torch's present number of threads."""
    return _choice(dtype, torch.get_num_threads())


def describe(dtype: torch.dtype) -> str:
    """Describes the products of a dtype in one clause."""
    chosen = choice(dtype)
    if len(set(chosen)) == 1:
        return f"matrix products by {NAMES[chosen.outputs]}"
    kinds = ("outputs", "gradients of inputs", "gradients of weights")
    named = [f"{NAMES[name]} ({kind})" for kind, name in zip(kinds, chosen, strict=True)]
    return f"matrix products by {', '.join(named)}"


@functools.cache
def _choice(dtype: torch.dtype, threads: int) -> Choice:
    names = candidates(dtype)
    if len(names) == 1:
        return DEFAULT
    about = {
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": threads,
        "dtype": str(dtype),
    }
    path = cache_folder() / f"products-{digest(to_json(about))}.json"
    try:
        if not path.exists():
            _write_first(path, lambda: about | {"choice": _measure(names, dtype)._asdict()})
        found = Choice(**json.loads(path.read_text())["choice"])
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT
    return found if set(found) <= set(names) else DEFAULT


def _write_first(path: Path, make: Callable[[], dict[str, Any]]) -> None:
    """Writes a JSON file unless another process does so first.

    Raises:
        OSError: The folder cannot be written; found before anything is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json") as file:
        file.write(to_json(make(), indent=2))
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)


def _measure(names: list[str], dtype: torch.dtype) -> Choice:
    """Returns the fastest product of each kind, by the sum of the least times of all shapes."""
    seconds = [dict.fromkeys(names, 0.0) for _ in DEFAULT]
    # modes that count or replace operations do not see these
    with _disable_current_modes(), torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for M, K, N in SHAPES:
            x, w, g = (torch.full(shape, 0.5, dtype=dtype) for shape in ((M, K), (N, K), (M, N)))
            for total, (a, b) in zip(seconds, ((x, w), (g, w.t()), (g.t(), x.t())), strict=True):
                for name, least in _times(names, a, b).items():
                    total[name] += least
    return Choice(*(min(names, key=lambda name: total[name] * (1 if name == names[0] else GAIN)) for total in seconds))


def _times(names: list[str], a: Tensor, b: Tensor) -> dict[str, float]:
    least = dict.fromkeys(names, float("inf"))
    for turn in range(ROUNDS + 1):
        for name in names:
            start = time.perf_counter()
            PRODUCTS[name](a, b, None)
            if turn:
                least[name] = min(least[name], time.perf_counter() - start)
    return least


def linear(x: Float[Tensor, "... K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> Tensor:
    """Computes `x weight^T + bias` as `torch.nn.functional.linear` does, by the products of `choice`.

    torch's own function is called while a graph is traced, by tensors other than plain ones, for small products, and
    on other devices. The result is differentiable any number of times.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu" or is_transforming():
        return F.linear(x, weight, bias)
    dtype = autocast_dtype(x) or x.dtype
    if x.numel() * len(weight) < SMALLEST or choice(dtype) == DEFAULT:
        return F.linear(x, weight, bias)
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    y = _Linear.apply(rows, weight.to(dtype), bias if bias is None else bias.to(dtype))
    return y.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            return PRODUCTS[choice(x.dtype).outputs](x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # a gradient that is itself to be differentiated takes torch's products, which have a derivative
        chosen = DEFAULT if torch.is_grad_enabled() else choice(x.dtype)
        needs = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            return (
                PRODUCTS[chosen.inputs](grad, weight.t(), None) if needs[0] else None,
                PRODUCTS[chosen.weights](grad.t(), x.t(), None) if needs[1] else None,
                grad.sum(0) if needs[2] else None,
            )


def is_transforming() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active.

    Kernels without rules for them would silently drop a tangent. Both checks are private interfaces of torch, as read
    in 2.14.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[0]


_operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if _operator is not None and _operator not in flop_registry:
    register_flop_formula(_operator)(_flops)
