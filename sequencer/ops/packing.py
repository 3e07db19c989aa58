"""A cache of packed weights, which the fused backends read in inference."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from sequencer.ops import cpu, fused
from sequencer.ops.reference import Weights


class PackedWeights:
    """Packed weights by slot, packed again when a parameter has changed.

    Changes are detected by the version counter and the address of each parameter. A write through `.data` changes
    neither of them. On a CPU it is detected by a checksum of the parameters. On a GPU a checksum would synchronise, so
    call `clear` after writing through `.data`. The modules that own a cache clear it in `train()` and `eval()`.
    """

    def __init__(self) -> None:
        self._slots: dict[Hashable, tuple[Any, fused.Packed, list[torch.Tensor]]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PackedWeights, ()  # a copied or unpickled cache starts empty

    def clear(self) -> None:
        """Removes all packed weights."""
        self._slots.clear()

    def get(
        self, slot: Hashable, weights: Sequence[Weights], cell: str, backend: str, dtype: torch.dtype
    ) -> fused.Packed:
        """Returns the packed weights of all directions of a layer.

        Args:
            slot: Identifies the layer and its directions within the module that owns the cache.
            weights: The parameters, one `Weights` a direction.
            cell: One of `sequencer.ops.fused.KEPT`.
            backend: `fused` or `triton`.
            dtype: Data type of the packed weights.
        """
        tensors = [tensor for w in weights for tensor in w if tensor is not None]
        if any(tensor.is_inference() for tensor in tensors):  # these have no version counter
            return fused.pack(weights, cell)
        bits = cpu.checksum([t.contiguous() for t in tensors], cell, dtype) if backend == "fused" else None
        # without a checksum the parameters' memory is kept, lest new parameters get the same address; computed ones,
        # as those of torch.nn.utils.parametrize, are new at each call
        owners = [tensor.detach() for tensor in tensors] if bits is None else []
        key = (cell, backend, dtype, *((t.data_ptr(), t._version) for t in tensors), bits)
        kept = self._slots.get(slot)
        if kept is None or kept[0] != key:
            with torch.inference_mode(False):  # usable outside of inference mode too
                kept = self._slots[slot] = (key, fused.pack_once(weights, cell, backend, dtype), owners)
        return kept[1]
