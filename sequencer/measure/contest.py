"""The comparison of contenders: outputs and gradients are checked, then all are timed in turns.

Contenders take turns, one pass each, so that other load on the machine affects them equally. No speed is reported
if the outputs or a gradient of a contender differ from those of the reference scan in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sequencer.machine import peak_memory, timed
from sequencer.measure.contenders import Contender
from sequencer.ops import configure
from sequencer.printing import first_line

TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative RMS error
WARMUP = 3  # passes

Mode = Literal["train", "inference"]


@dataclass
class Case:
    """The input of all contenders.

    Attributes:
        x: The input of the module.
        upstream: The gradient of the output.
        dtype: float32, or the dtype of autocast.
    """

    x: Tensor
    upstream: Tensor
    dtype: torch.dtype

    def train(self, module: nn.Module) -> list[Tensor]:
        """Returns the output, the gradient of the input if it requires one, and those of all parameters."""
        inputs = [tensor for tensor in (self.x, *module.parameters()) if tensor.requires_grad]
        for tensor in inputs:
            tensor.grad = None
        y = self.outputs(module if module.training else module.train())
        y.backward(self.upstream.to(y.dtype))
        return [y.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]

    def infer(self, module: nn.Module) -> list[Tensor]:
        """Returns the output in eval mode."""
        with torch.inference_mode():
            return [self.outputs(module.eval() if module.training else module)]

    def outputs(self, module: nn.Module) -> Tensor:
        """Returns the output in the module's present mode."""
        with torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return module(self.x.view_as(self.x))  # a view, since FlopCounterMode fails on a leaf


@dataclass
class Result:
    """Measurements of one contender in one mode."""

    contender: str
    mode: Mode
    seconds: list[float]  # of each pass
    memory: int | None  # peak, in bytes in addition to what was held before
    flops: int

    @property
    def median(self) -> float:
        """Median seconds of a pass."""
        return median(self.seconds)

    def record(self) -> dict[str, Any]:
        """The measurements with percentiles of the time, for JSON."""
        p20, *_, p80 = quantiles(self.seconds, n=5, method="inclusive")
        return {
            "contender": self.contender,
            "mode": self.mode,
            "median_s": self.median,
            "p20_s": p20,
            "p80_s": p80,
            "peak_memory_bytes": self.memory,
            "flops": self.flops,
        }


def compile_failures(contenders: Sequence[Contender], case: Case) -> dict[str, str]:
    """Runs each compiled contender once in training and in inference.

    Returns:
        The first line of the error of each contender that failed, by name: torch.compile does not support every module
        in every version.
    """
    failures = {}
    for contender in contenders:
        if not contender.compiled:
            continue
        try:
            with contender.settings() as module:
                case.train(module)
                case.infer(module)
        except Exception as error:  # the compiler, its backends and the C++ compiler raise errors of many types
            failures[contender.name] = first_line(error)
    return failures


def check_outputs(contenders: Sequence[Contender], case: Case) -> dict[str, float | None]:
    """Checks all contenders against the reference scan in float64.

    The limit is the tolerance of the dtype, or three times the error of timm's modules if that is larger.

    Returns:
        The errors by name, as `relative_error` returns them.

    Raises:
        RuntimeError: Outputs or gradients of a contender are wrong.
    """
    errors = {contender.name: relative_error(contender, case) for contender in contenders}
    peers = [error for name, error in errors.items() if name.startswith("timm") and error is not None]
    limit = max(TOLERANCES[case.dtype], 3 * max(peers, default=0.0))
    wrong = {name: error for name, error in errors.items() if error is not None and not error <= limit}
    if wrong:
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise RuntimeError(f"no speed is reported, outputs or gradients are wrong: {listed}; limit {limit:.1e}")
    return errors


def relative_error(contender: Contender, case: Case) -> float | None:
    """The largest relative RMS error of the output and of every gradient; None if there is nothing to compare with.

    For an exported module only the output is compared.
    """
    if contender.exact is None:
        return None
    if contender.origin is not None:
        (output,) = case.infer(contender.module)
        configure("reference")
        (expected,) = Case(case.x.double(), case.upstream, torch.float32).infer(contender.exact)
        configure()
        return _rms(output, expected)
    x = case.x.detach().double().requires_grad_(case.x.requires_grad)
    configure("reference")
    exact = Case(x, case.upstream.double(), torch.float32).train(contender.exact)
    with contender.settings() as module:
        actual = case.train(module)
    offset = 1 + case.x.requires_grad  # the tensors before the gradients of the parameters
    expected_grads = dict(zip(_trainable(contender.exact), exact[offset:], strict=True))
    grads = dict(zip(_trainable(contender.countable), actual[offset:], strict=True))  # in another order
    pairs = [
        *zip(actual[:offset], exact[:offset], strict=True),
        *((grads[name], expected_grads[name]) for name in grads),
    ]
    return max(_rms(*pair) for pair in pairs)


def _trainable(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def _rms(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def measure(contenders: Sequence[Contender], case: Case, mode: Mode, rounds: int) -> list[Result]:
    """Times `rounds` passes of every contender, in turns, after a warm-up."""
    step: Callable[[nn.Module], Any] = case.train if mode == "train" else case.infer
    # counted in float32: where oneDNN has no bfloat16 LSTM, torch takes a path that the counter does not see
    wide = replace(case, dtype=torch.float32)
    flops: dict[str, int] = {}
    memory: dict[str, int | None] = {}
    for contender in contenders:
        with contender.settings() as module:
            with FlopCounterMode(display=False) as counter:
                (wide.train if mode == "train" else wide.infer)(contender.countable)
            flops[contender.name] = counter.get_total_flops()
            for _ in range(WARMUP):
                step(module)
            # onnxruntime keeps the memory of its first pass, so that later passes would show none
            exported = contender.origin is not None
            memory[contender.name] = None if exported else peak_memory(lambda: step(module), case.x.device)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            with contender.settings() as module:
                seconds[contender.name].append(timed(lambda: step(module), case.x.device))
    return [Result(name, mode, seconds[name], memory[name], flops[name]) for name in seconds]
