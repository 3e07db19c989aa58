"""Speed and memory of our recurrences and models beside their peers: checked for equal outputs, timed in one run.

Contenders take turns, one pass each, so that whatever else the machine does falls on all of them alike. A speed is
reported only after the gate: outputs and every gradient against the reference scan in float64.
"""

import contextlib
import copy
import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import timm
import torch
from timm.models.sequencer import LSTM2d
from timm.models.sequencer import sequencer2d_l as timm_l
from timm.models.sequencer import sequencer2d_m as timm_m
from timm.models.sequencer import sequencer2d_s as timm_s
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

from sequencer.layers import RNN2d
from sequencer.ops import configure

TIMM_MODELS = {"sequencer2d_s": timm_s, "sequencer2d_m": timm_m, "sequencer2d_l": timm_l}
TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative RMS
WARMUP = 3


@dataclass
class Contender:
    """A module in one setting; `exact` is what its outputs are checked against. One that was exported from an `origin`
    has no gradients, and operations that can only be counted there."""

    name: str
    module: nn.Module
    backend: str | None = None
    recompute: bool = False
    compiled: bool = False
    exact: nn.Module | None = None
    origin: nn.Module | None = None
    counted: nn.Module = field(init=False)  # the module as it is, for the counting of operations

    def __post_init__(self) -> None:
        self.counted = self.origin or self.module
        if self.compiled:
            self.module = torch.compile(self.module)  # type: ignore[assignment]

    @contextlib.contextmanager
    def settings(self) -> Iterator[nn.Module]:
        configure(self.backend, self.recompute)
        try:
            yield self.module
        finally:
            configure()


@dataclass
class Case:
    """What all contenders are given; `dtype` other than float32 is that of autocast."""

    x: Tensor
    upstream: Tensor
    dtype: torch.dtype

    def train(self, module: nn.Module) -> list[Tensor]:
        """Outputs and gradients of the input, where it takes one, and of every parameter."""
        inputs = [tensor for tensor in (self.x, *module.parameters()) if tensor.requires_grad]
        for tensor in inputs:
            tensor.grad = None
        y = self.outputs(module if module.training else module.train())
        y.backward(self.upstream.to(y.dtype))
        return [y.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]

    def infer(self, module: nn.Module) -> list[Tensor]:
        with torch.inference_mode():
            return [self.outputs(module.eval() if module.training else module)]

    def outputs(self, module: nn.Module) -> Tensor:
        with torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return module(self.x.view_as(self.x))  # a view, since FlopCounterMode fails on a leaf


@dataclass
class Result:
    """One contender in one mode: times in seconds, memory in bytes beyond what was held before."""

    contender: str
    mode: str
    seconds: list[float]
    memory: int | None
    flops: int
    error: float | None

    @property
    def median(self) -> float:
        return median(self.seconds)

    def record(self) -> dict[str, Any]:
        p20, *_, p80 = quantiles(self.seconds, n=5, method="inclusive")
        return {
            "contender": self.contender,
            "mode": self.mode,
            "median_s": self.median,
            "p20_s": p20,
            "p80_s": p80,
            "peak_memory_bytes": self.memory,
            "flops": self.flops,
            "relative_error": self.error,
        }


class PackedLSTM2d(LSTM2d):
    """timm's layer on packed sequences, for which cuDNN takes another algorithm."""

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        v = self._sweep(self.rnn_v, x.permute(0, 2, 1, 3).reshape(-1, H, C))
        v = v.reshape(B, W, H, -1).permute(0, 2, 1, 3)
        h = self._sweep(self.rnn_h, x.reshape(-1, W, C)).reshape(B, H, W, -1)
        assert self.fc is not None
        return self.fc(torch.cat([v, h], dim=-1))

    @staticmethod
    def _sweep(rnn: nn.Module, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [x.shape[1]] * x.shape[0], batch_first=True)
        return pad_packed_sequence(rnn(packed)[0], batch_first=True)[0]


def randomise(module: nn.Module) -> nn.Module:
    """Draws every parameter anew, at scales that keep activations near 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return module


def layer_contenders(
    C: int, D: int, backends: Sequence[str], peers: Sequence[str], compiled: bool, device: torch.device
) -> list[Contender]:
    """The peers, then ours, all of one set of weights (IndyLSTM apart)."""
    theirs = randomise(LSTM2d(C, D, bidirectional=True)).to(device)
    ours = RNN2d(C, D).to(device)
    ours.load_state_dict(theirs.state_dict())
    indy = randomise(RNN2d(C, D, "indylstm")).to(device)
    exact, exact_indy = (copy.deepcopy(module).double() for module in (ours, indy))
    found = []
    if "timm" in peers:
        found.append(Contender("timm", theirs, exact=exact))
        if compiled:
            found.append(Contender("timm, compiled", copy.deepcopy(theirs), compiled=True, exact=exact))
    if "packed" in peers:
        packed = PackedLSTM2d(C, D, bidirectional=True).to(device)
        packed.load_state_dict(theirs.state_dict())
        found.append(Contender("timm, packed", packed, exact=exact))
    for backend in backends:
        found.append(Contender(f"lstm, {backend}", copy.deepcopy(ours), backend, exact=exact))
    fastest = backends[0]
    found.append(Contender(f"lstm, {fastest}, recompute", copy.deepcopy(ours), fastest, recompute=True, exact=exact))
    if compiled:
        found.append(Contender(f"lstm, {fastest}, compiled", copy.deepcopy(ours), fastest, compiled=True, exact=exact))
    found.append(Contender(f"indylstm, {fastest}", indy, fastest, exact=exact_indy))
    return found


def model_contenders(
    name: str, img_size: int, backends: Sequence[str], peers: Sequence[str], compiled: bool, device: torch.device
) -> list[Contender]:
    """The peers, `timm` being its model of the same name and the same weights, then ours."""
    ours = randomise(timm.create_model(name)).to(device)
    exact = copy.deepcopy(ours).double()
    found = []
    for peer in peers:
        if peer == "timm":
            theirs = TIMM_MODELS[name]().to(device)
            theirs.load_state_dict(ours.state_dict())
            # its own schedule of stochastic depth has no part in a comparison of speed: the rate is 0 in both
            found.append(Contender("timm", theirs, exact=exact))
            if compiled:
                found.append(Contender("timm, compiled", copy.deepcopy(theirs), compiled=True, exact=exact))
            if device.type == "cuda":
                last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                found.append(Contender("timm, channels_last", last, exact=exact))
        else:
            found.append(Contender(peer, timm.create_model(peer).to(device)))
    for backend in backends:
        found.append(Contender(f"{name}, {backend}", copy.deepcopy(ours), backend, exact=exact))
    fastest = backends[0]
    if compiled:
        found.append(
            Contender(f"{name}, {fastest}, compiled", copy.deepcopy(ours), fastest, compiled=True, exact=exact)
        )
    return found


def gate(contender: Contender, case: Case) -> float | None:
    """The largest relative RMS error of the outputs and of every gradient; None where nothing is to equal."""
    if contender.exact is None:
        return None
    if contender.origin is not None:
        (y,) = case.infer(contender.module)
        configure("reference")
        (expected_y,) = Case(case.x.double(), case.upstream, torch.float32).infer(contender.exact)
        configure()
        return float((y.double() - expected_y).norm() / expected_y.norm())
    x = case.x.detach().double().requires_grad_(case.x.requires_grad)
    configure("reference")
    exact = Case(x, case.upstream.double(), torch.float32).train(contender.exact)
    named = [name for name, p in contender.exact.named_parameters() if p.requires_grad]
    with contender.settings() as module:
        actual = case.train(module)
    offset = len(exact) - len(named)
    expected = dict(zip(named, exact[offset:], strict=True))
    got = dict(
        zip([n for n, p in contender.counted.named_parameters() if p.requires_grad], actual[offset:], strict=True)
    )
    pairs = [*zip(actual[:offset], exact[:offset], strict=True), *((got[name], expected[name]) for name in named)]
    return max(float((a.double() - e).norm() / e.norm()) for a, e in pairs)


def measure(contenders: Sequence[Contender], case: Case, mode: str, rounds: int) -> list[Result]:
    """`rounds` passes of each in turn, after a warm-up; `mode` is train or inference."""
    step: Callable[[nn.Module], Any] = case.train if mode == "train" else case.infer
    flops, memory, seconds = {}, {}, {contender.name: [] for contender in contenders}  # type: ignore[var-annotated]
    # oneDNN has no bfloat16 LSTM on every CPU, and the counter does not go the way that torch takes then
    wide = replace(case, dtype=torch.float32)
    for contender in contenders:
        with contender.settings() as module:
            with FlopCounterMode(display=False) as counter:
                (wide.train if mode == "train" else wide.infer)(contender.counted)
            flops[contender.name] = counter.get_total_flops()
            for _ in range(WARMUP):
                step(module)
            # what another runtime takes it keeps, so that only its first pass would show it
            exported = contender.origin is not None
            memory[contender.name] = None if exported else peak_memory(lambda: step(module), case.x.device)
    for _ in range(rounds):
        for contender in contenders:
            with contender.settings() as module:
                seconds[contender.name].append(timed(lambda: step(module), case.x.device))
    return [Result(name, mode, seconds[name], memory[name], flops[name], None) for name in seconds]


def timed(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(work: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that the work holds at its peak beyond what was held before; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide what is taken
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def layer_bytes(B: int, H: int, W: int, C: int, D: int, mode: str, dtype: torch.dtype) -> int:
    """What a BiLSTM2D layer cannot but move: in inference input, hidden states and output, each once; in training
    gates and cells written and read, hidden states, input, output and their gradients. Weights are few."""
    size = torch.finfo(dtype).bits // 8
    tokens = B * H * W
    elements = 2 * C + 2 * 4 * D if mode == "inference" else 5 * C + 2 * (16 + 4) * D + 4 * 4 * D
    return tokens * elements * size


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs a second of a large matrix product, and bytes a second of a large copy (read and written)."""
    n, length = (8192, 2**28) if device.type == "cuda" else (2048, 2**25)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(length, device=device)
    target = torch.zeros_like(source)
    products = [timed(lambda: torch.mm(a, b), device) for _ in range(8)]
    copies = [timed(lambda: target.copy_(source), device) for _ in range(8)]
    return 2 * n**3 / min(products), 2 * 4 * length / min(copies)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
