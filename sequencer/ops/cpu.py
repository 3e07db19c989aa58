"""Recurrences on a CPU: products by `sequencer.ops.products`, scans over time by a kernel, see `cpu_kernel`.

Where the processor has AVX512-BF16, inputs in bfloat16 are computed in bfloat16, with state and sums in float32.
Otherwise, and in float16, they are converted to float32.

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `S` number of directions, `D` hidden size, `G`
gates of the cell, `J` biases of a unit. Direction codes are those of `sequencer.ops.fused`.
"""

import ctypes
import functools
import subprocess
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sequencer.ops import cpu_kernel, products, reference
from sequencer.ops.cpu_kernel import POINTER, SIZE

CELLS = ("lstm", "peephole_lstm", "indylstm", "lstm1997", "gru", "rnn", "rnn_relu")
PLAIN = ("rnn", "rnn_relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Gate values that a thread computes before the kernel reads them: few enough to be in cache still, and many enough that
# a product, which is faster in bfloat16, takes long compared with the reordering of its weights.
CHUNK = {torch.float32: 2**20, torch.bfloat16: 2**22}


@functools.cache
def unavailable(cell: str = "lstm", dtype: torch.dtype = torch.float32) -> str | None:
    """Returns why the kernel is not available on this machine, or None if it is; builds it at the first call."""
    try:
        cpu_kernel.library(cell, compute_dtype(dtype, cell))
    except subprocess.CalledProcessError as error:
        return f"the C++ compiler failed: {error.stderr.strip().splitlines()[-1] if error.stderr else error}"
    except OSError as error:
        return str(error)
    return None


def compute_dtype(dtype: torch.dtype, cell: str = "lstm") -> torch.dtype:
    """Returns the dtype in which inputs of `dtype` are computed, and gates and cells are kept.

    The derivatives of a plain RNN are functions of its outputs, for which bfloat16 is too coarse.
    """
    narrow = dtype == torch.bfloat16 and cell not in PLAIN and cpu_kernel.has_bfloat16()
    return torch.bfloat16 if narrow else torch.float32


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which gates and cells are kept for the backward pass, for inputs of `dtype`."""
    return compute_dtype(dtype)


def pack(weight_hh: Tensor, cell: str) -> Tensor:
    """Converts recurrent weights to the layout that the forward pass reads.

    Args:
        weight_hh: Weights `[S, GD, D]`, or diagonals `[S, GD]`, whose layout is kept, in float32.
        cell: One of `CELLS`.

    Returns:
        Layout `[S, blocks, depth, G, lanes]`: `lanes` is the number of floats in a vector register, and a block is
        `lanes` consecutive units (rows), padded with zeros. Within a block, the weights of unit k of the previous step
        are contiguous for all gates. In bfloat16 pairs of units of the previous step, which one instruction multiplies,
        are adjacent: `[S, blocks, depth / 2, G, lanes, 2]`.
    """
    dtype = compute_dtype(weight_hh.dtype, cell)
    if weight_hh.dim() == 2:
        return weight_hh.float().contiguous()
    S, D, library = weight_hh.shape[0], weight_hh.shape[2], cpu_kernel.library(cell, dtype)
    lanes, padding, pair = library.lanes(), -D % library.padding(), 1 + (dtype == torch.bfloat16)
    padded = F.pad(weight_hh.to(dtype).view(S, -1, D, D), (0, library.depth(D) - D, 0, padding))
    blocks = padded.view(S, padded.shape[1], -1, lanes, padded.shape[3] // pair, pair)
    return blocks.permute(0, 2, 4, 1, 3, 5).contiguous()


def _pack_backward(weight_hh: Tensor, cell: str) -> Tensor:
    """Converts recurrent weights `[S, GD, D]` to the layout that the backward pass reads.

    Layout `[S, blocks, GP, V * lanes]`: `P` is D padded with zeros, and a block is `V * lanes`
    consecutive units of the previous step (columns). Within a block, the weights of one gate row of the next step are
    contiguous; in bfloat16 pairs of rows are adjacent, `[S, blocks, GP / 2, V * lanes, 2]`. Diagonals `[S, GD]` keep
    their layout, in float32.
    """
    dtype = compute_dtype(weight_hh.dtype, cell)
    if weight_hh.dim() == 2:
        return weight_hh.float().contiguous()
    S, D, library = weight_hh.shape[0], weight_hh.shape[2], cpu_kernel.library(cell, dtype)
    lanes, padding, pair = library.lanes(), -D % library.padding(), 1 + (dtype == torch.bfloat16)
    padded = F.pad(weight_hh.to(dtype).view(S, -1, D, D), (0, padding, 0, padding))
    rows = padded.shape[1] * padded.shape[2]
    return padded.view(S, rows // pair, pair, -1, library.vectors(D) * lanes).permute(0, 3, 1, 4, 2).contiguous()


def checksum(tensors: Sequence[Tensor], cell: str, dtype: torch.dtype) -> int:
    """Returns a checksum of the bits of contiguous tensors, by which changes of their values are detected.

    The cell and the dtype are those of the layer, whose kernel's library computes it.
    """
    pointers = (POINTER * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    sizes = (SIZE * len(tensors))(*(tensor.nbytes for tensor in tensors))
    library = cpu_kernel.library(cell, compute_dtype(dtype, cell))
    return library.checksum(pointers, sizes, len(tensors), torch.get_num_threads())


def forward(
    x: Tensor, weight_ih: Tensor, packed: Tensor, bias: Tensor, cell: str, directions: Sequence[int], save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Runs one layer in all directions, from a zero state.

    Args:
        x: Token map `[B, H, W, C]`.
        weight_ih: Input weights `[S GD, C]`.
        packed: Recurrent weights as returned by `pack`.
        bias: Biases `[S, JD]`.
        cell: One of `CELLS`.
        directions: `S` direction codes.
        save: If True, gates and cells are returned for the backward pass.

    Returns:
        Outputs `[B, H, W, S D]` in the dtype of `x`, then what `sequencer.ops.fused.KEPT` describes, in the dtype of
        the computation, or None for both.
    """
    B, H, W, _ = x.shape
    S, G, dtype = len(directions), reference.CELLS[cell].gates, compute_dtype(x.dtype, cell)
    D, save = weight_ih.shape[0] // S // G, save and cell not in PLAIN
    tokens, weight, bias = _rows(x, dtype), weight_ih.to(dtype), bias.float().contiguous()
    out = tokens.new_empty(B * H * W, S * D)
    project = products.choice(dtype).outputs
    in_place = project == "torch"  # other products write to new tensors
    gates = None
    if save:
        gates = tokens.new_empty(B * H * W, S * G * D) if in_place else products.PRODUCTS[project](tokens, weight, None)
    cells = torch.empty_like(out) if save else None
    library, scratch = cpu_kernel.library(cell, dtype), None
    for rows, images in _chunks(library, x, directions, CHUNK[dtype] // (G * D)):
        if scratch is None:
            scratch = tokens.new_empty(images * H * W if in_place and not save else 0, S * G * D)
        target = gates[rows] if gates is not None else scratch[: images * H * W]
        if in_place:
            torch.mm(tokens[rows], weight.t(), out=target)
        elif not save:
            target = products.PRODUCTS[project](tokens[rows], weight, None)
        call = cpu_kernel.Forward(
            _map(library, images, H, W, D, directions),
            bias.data_ptr(),
            packed.data_ptr(),
            target.data_ptr(),
            out[rows].data_ptr(),
            None if cells is None else cells[rows].data_ptr(),
        )
        library.forward(ctypes.byref(call))
    return out.view(B, H, W, S * D).to(x.dtype), gates, cells


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    cell: str,
    directions: Sequence[int],
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of x, weight_ih, weight_hh and bias, whose shapes are those of `forward` and `pack`."""
    _, H, W, _ = x.shape
    S, G, dtype = len(directions), reference.CELLS[cell].gates, compute_dtype(x.dtype, cell)
    D, J = out.shape[-1] // S, bias.numel() // out.shape[-1]
    tokens, outputs, grad_outputs, weight = (*(_rows(t, dtype) for t in (x, out, grad_out)), weight_ih.to(dtype))
    packed, library = _pack_backward(weight_hh, cell), cpu_kernel.library(cell, dtype)
    biases = bias.float().contiguous()
    grad_x, grad_ih = torch.empty_like(tokens), torch.zeros_like(weight, dtype=torch.float32)
    grad_hh = torch.zeros_like(weight_hh, dtype=torch.float32)
    grad_bias = torch.zeros_like(bias, dtype=torch.float32)
    chosen = products.choice(dtype)
    recurrent = 2 if cell == "gru" else G  # gates whose input and recurrent terms have the same gradient
    scratch: list[Tensor] = []
    for rows, images in _chunks(library, x, directions, CHUNK[dtype] // (G * D)):
        size = _map(library, images, H, W, D, directions)
        if not scratch:
            scratch = [tokens.new_empty(images * H * W, S * n * D) for n in (G, G - recurrent, 1)]
        grad_gates, grad_recurrent, previous = (buffer[: images * H * W] for buffer in scratch)
        counts = [-(-images * (W if direction < 2 else H) // size.tile) for direction in directions]
        bias_sums = grad_bias.new_empty(sum(counts), J * D)
        diagonal_sums = torch.empty_like(bias_sums) if cell == "indylstm" else None
        call = cpu_kernel.Backward(
            size,
            packed.data_ptr(),
            biases.data_ptr(),
            *(t[rows].data_ptr() if t.numel() else None for t in (gates, cells, outputs, grad_outputs)),
            *(
                None if t is None else t.data_ptr()
                for t in (grad_gates, grad_recurrent, previous, bias_sums, diagonal_sums)
            ),
        )
        library.backward(ctypes.byref(call))
        if chosen.inputs == "torch":
            torch.mm(grad_gates, weight, out=grad_x[rows])
        else:
            grad_x[rows] = products.PRODUCTS[chosen.inputs](grad_gates, weight.t(), None)
        _add_product(grad_ih, grad_gates, tokens[rows], chosen.weights)
        grad_bias += torch.stack([part.sum(0) for part in bias_sums.split(counts)])
        if diagonal_sums is not None:
            grad_hh += torch.stack([part.sum(0) for part in diagonal_sums.split(counts)])
            continue
        for s in range(S):
            before = previous[:, s * D : (s + 1) * D]
            _add_product(grad_hh[s, : recurrent * D], grad_gates[:, s * G * D :][:, : recurrent * D], before, "torch")
            if recurrent < G:
                _add_product(grad_hh[s, recurrent * D :], grad_recurrent[:, s * D : (s + 1) * D], before, "torch")
    return (
        grad_x.view_as(x).to(x.dtype),
        grad_ih.to(weight_ih.dtype),
        grad_hh.to(weight_hh.dtype),
        grad_bias.to(bias.dtype),
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor, product: str) -> None:
    """Adds `a^T b` to a float32 tensor."""
    if product == "torch" and a.dtype == torch.float32:
        total.addmm_(a.t(), b)
    else:
        total += products.PRODUCTS[product](a.t(), b.t(), None)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `[B, H, W, C]` as contiguous `[tokens, C]`."""
    return x.reshape(-1, x.shape[-1]).to(dtype).contiguous()


def _map(library: ctypes.CDLL, B: int, H: int, W: int, D: int, directions: Sequence[int]) -> cpu_kernel.Map:
    """Describes the token map to the kernel; the tile is small enough that every thread has work, if possible."""
    threads = torch.get_num_threads()
    sequences = sum(B * (W if direction < 2 else H) for direction in directions)
    tile = max(1, min(library.max_tile(), sequences // threads))
    codes = (SIZE * len(directions))(*directions)
    size = cpu_kernel.Map(B, H, W, D, len(directions), tile, threads, ctypes.cast(codes, POINTER))
    size.keep_alive = codes  # the structure holds only their address
    return size


def _chunks(library: ctypes.CDLL, x: Tensor, directions: Sequence[int], rows: int) -> Iterator[tuple[slice, int]]:
    """Splits the batch into chunks of a few images; yields the token rows and the number of images of each.

    The first chunk is the largest. `rows` are the tokens of one direction that a thread takes at most, if possible.
    """
    B, H, W, _ = x.shape
    threads = torch.get_num_threads()
    sequences = sum(W if direction < 2 else H for direction in directions)
    step = max(rows * threads // (H * W * len(directions)), -(-library.max_tile() * threads // sequences), 1)
    for first in range(0, B, step):
        images = min(step, B - first)
        yield slice(first * H * W, (first + images) * H * W), images
