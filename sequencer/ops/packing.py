"""What the fused backends make of the weights, kept from one inference to the next."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sequencer.ops import cpu, fused
from sequencer.ops.reference import Weights


class PackedWeights:
    """Packed weights by slot, made anew when a parameter has changed.

    A change shows in a parameter's version or address. Writing through `.data` shows in neither; on a CPU a checksum
    of the parameters finds it. On a GPU, which reading one back would stall, the owner calls `clear` whenever it is
    put into training or evaluation mode, and so must who writes through `.data` in between.
    """

    def __init__(self) -> None:
        self._slots: dict[Hashable, tuple[Any, fused.Packed]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PackedWeights, ()  # copies and pickles start empty

    def clear(self) -> None:
        self._slots.clear()

    def get(self, slot: Hashable, weights: Sequence[Weights], backend: str, dtype: torch.dtype) -> fused.Packed:
        """The weights of all sweeps of a layer, in `dtype`."""
        tensors = [tensor for w in weights for tensor in w if tensor is not None]
        if any(tensor.is_inference() for tensor in tensors):  # these count no versions
            return fused.pack(weights)
        key = (backend, dtype, *((t.data_ptr(), t._version) for t in tensors), _checksum(tensors, backend))
        kept = self._slots.get(slot)
        if kept is None or kept[0] != key:
            with torch.inference_mode(False):  # what is kept may serve outside of inference mode too
                kept = self._slots[slot] = (key, fused.pack_once(weights, backend, dtype))
        return kept[1]


def _checksum(tensors: list[Tensor], backend: str) -> int | None:
    if backend != "fused" or any(t.dtype != torch.float32 or not t.is_contiguous() for t in tensors):
        return None
    return cpu.checksum(tensors)
