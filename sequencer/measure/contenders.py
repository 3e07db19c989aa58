"""The modules that are compared: our layers and models, and their peers with the same weights."""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from timm.models.sequencer import LSTM2d
from timm.models.sequencer import sequencer2d_l as timm_l
from timm.models.sequencer import sequencer2d_m as timm_m
from timm.models.sequencer import sequencer2d_s as timm_s
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sequencer.config.errors import RequestError
from sequencer.export import describe_export, to_onnx
from sequencer.layers import RNN2d
from sequencer.models import LoadedModel, load_exported, pretrained_cfg
from sequencer.ops import configure, explain

TIMM_MODELS = {"sequencer2d_s": timm_s, "sequencer2d_m": timm_m, "sequencer2d_l": timm_l}


@dataclass
class Contender:
    """A module with the settings that it runs in.

    Attributes:
        name: Name in tables.
        module: The module that is measured.
        backend: Backend of our recurrences; None leaves the choice to them.
        recompute: Whether our recurrences recompute the gates in the backward pass.
        compiled: Whether the module is compiled.
        exact: The module in float64, whose outputs and gradients are the expected ones; None if there are none.
        origin: The module that an exported `module` was made from. An exported module has no gradients, and its
            operations cannot be counted.
        countable: The module whose operations are counted: `origin`, or `module` before it is compiled.
    """

    name: str
    module: nn.Module
    backend: str | None = None
    recompute: bool = False
    compiled: bool = False
    exact: nn.Module | None = None
    origin: nn.Module | None = None
    countable: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.countable = self.origin or self.module
        if self.compiled:
            # layers of different sizes share code, for which inductor fails in 2.14 where it takes sizes for variable
            self.module = torch.compile(self.module, dynamic=False)  # type: ignore[assignment]

    @contextlib.contextmanager
    def settings(self) -> Iterator[nn.Module]:
        """Yields the module while its backend and recomputation are set."""
        configure(self.backend, self.recompute)
        try:
            yield self.module
        finally:
            configure()


class PackedLSTM2d(LSTM2d):
    """timm's layer on packed sequences, for which cuDNN uses another algorithm."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `B H W C` to `B H W C`."""
        B, H, W, C = x.shape
        v = self._scan(self.rnn_v, x.permute(0, 2, 1, 3).reshape(-1, H, C))
        v = v.reshape(B, W, H, -1).permute(0, 2, 1, 3)
        h = self._scan(self.rnn_h, x.reshape(-1, W, C)).reshape(B, H, W, -1)
        assert self.fc is not None
        return self.fc(torch.cat([v, h], dim=-1))

    @staticmethod
    def _scan(rnn: nn.Module, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [x.shape[1]] * x.shape[0], batch_first=True)
        return pad_packed_sequence(rnn(packed)[0], batch_first=True)[0]


def choose_backends(names: Sequence[str] | None, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends to measure: `names`, or the one that is chosen by default and torch's.

    Raises:
        RequestError: There is no such backend, or it does not run here.
    """
    for name in names or ():
        try:
            explain("lstm", 48, dtype, device, name)
        except ValueError as error:
            raise RequestError(f"--backend {name}: {error}") from error
    return list(names or dict.fromkeys([explain("lstm", 48, dtype, device).backend, "torch"]))


def check_model(name: str, img_size: int) -> None:
    """Checks that a model can be compared with timm's at a size.

    Raises:
        RequestError: timm has no model of this name, or the model does not take images of this size.
    """
    if name not in TIMM_MODELS:
        raise RequestError(f"--model {name}: there are {', '.join(TIMM_MODELS)}")
    try:
        with torch.device("meta"):
            timm.create_model(name, img_size=img_size)
    except ValueError as error:
        raise RequestError(f"--img-size {img_size}: {error}") from error


def check_peers(names: Sequence[str]) -> None:
    """Checks that every peer of a model is `timm`, `packed` or the name of a timm model.

    Raises:
        RequestError: A peer is none of them.
    """
    for name in names:
        if name not in ("timm", "packed") and not timm.is_model(name):
            raise RequestError(f"--peer {name}: timm has no such model")


def randomise(module: nn.Module) -> nn.Module:
    """Draws every parameter at random, at scales that keep activations near 1."""
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
    """BiLSTM2D layers with the same weights, the peers first, and layers of IndyLSTM and GRU with their own.

    Args:
        C: Channels.
        D: Hidden size per direction.
        backends: Backends of our layer; the first one is also measured with recomputation.
        peers: `timm` and `packed`, timm's layer on packed sequences.
        compiled: Add compiled contenders.
        device: Where the layers are.
    """
    theirs = randomise(LSTM2d(C, D, bidirectional=True)).to(device)
    ours = RNN2d(C, D).to(device)
    ours.load_state_dict(theirs.state_dict())
    indy = randomise(RNN2d(C, D, "indylstm")).to(device)
    gru = randomise(RNN2d(C, D, "gru")).to(device)
    exact, exact_indy, exact_gru = (copy.deepcopy(module).double() for module in (ours, indy, gru))
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
    for backend in backends:
        found.append(Contender(f"gru, {backend}", copy.deepcopy(gru), backend, exact=exact_gru))
    return found


def model_contenders(
    name: str, backends: Sequence[str], peers: Sequence[str], compiled: bool, device: torch.device
) -> list[Contender]:
    """The peers of a model, then the model on every backend.

    Args:
        name: A key of `TIMM_MODELS`.
        backends: Backends of our model.
        peers: Names of timm models; `timm` is its model of the same name, with the same weights, and `packed` this
            model with packed sequences.
        compiled: Add compiled contenders.
        device: Where the models are.
    """
    ours = randomise(timm.create_model(name)).to(device)
    exact = copy.deepcopy(ours).double()
    found = []
    for peer in peers:
        if peer not in ("timm", "packed"):
            found.append(Contender(peer, timm.create_model(peer).to(device)))
            continue
        # the stochastic depth of timm's model, which differs from ours, does not matter: the rate is 0 in both
        theirs = TIMM_MODELS[name]().to(device)
        theirs.load_state_dict(ours.state_dict())
        if peer == "packed":
            for layer in [module for module in theirs.modules() if type(module) is LSTM2d]:
                layer.__class__ = PackedLSTM2d
            found.append(Contender("timm, packed", theirs, exact=exact))
            continue
        found.append(Contender("timm", theirs, exact=exact))
        if compiled:
            found.append(Contender("timm, compiled", copy.deepcopy(theirs), compiled=True, exact=exact))
        if device.type == "cuda":
            last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            found.append(Contender("timm, channels_last", last, exact=exact))
    for backend in backends:
        found.append(Contender(f"{name}, {backend}", copy.deepcopy(ours), backend, exact=exact))
    if compiled:
        fastest = backends[0]
        found.append(
            Contender(f"{name}, {fastest}, compiled", copy.deepcopy(ours), fastest, compiled=True, exact=exact)
        )
    return found


def export_contenders(
    name: str, img_size: int, backends: Sequence[str]
) -> tuple[list[Contender], dict[str, dict[str, int]]]:
    """timm's model, ours on every backend, and both as ONNX graphs in onnxruntime on the CPU.

    Ours is exported as `export_graph` does it, timm's by torch's exporter alone.

    Returns:
        The contenders, and for each graph the number of nodes by operator.
    """
    import onnx  # an optional dependency

    found = model_contenders(name, backends, ["timm"], False, torch.device("cpu"))
    theirs, ours = found[0].module, found[1].module
    description = describe_export(LoadedModel(ours, name, "raw", None, pretrained_cfg(ours)), img_size, False)
    nodes = {}
    with TemporaryDirectory() as folder:
        paths = {"ONNX": Path(folder, "ours.onnx"), "timm, ONNX": Path(folder, "theirs.onnx")}
        to_onnx(ours, paths["ONNX"], description, torch.float32)
        to_onnx(theirs, paths["timm, ONNX"], description, torch.float32, replace=lambda model: None)
        for title, path in paths.items():
            nodes[title] = dict(Counter(node.op_type for node in onnx.load(path).graph.node))
            found.append(Contender(title, load_exported(path, trust=True), exact=found[0].exact, origin=ours))
    return found, nodes
