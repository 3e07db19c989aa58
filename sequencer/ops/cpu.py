"""Recurrences on a CPU: products by `sequencer.ops.products`, scans over time by the kernel in `recurrence.cpp`.

The kernel is compiled in 2 s by the C++ compiler on the PATH, or the one named by `CXX`. The library is kept in the
user's cache folder (`XDG_CACHE_HOME`), one file for each combination of source, compiler, instruction set, cell and
dtype. The kernel runs on torch's threads, since it uses the OpenMP runtime that torch has loaded. Where the processor
has AVX512-BF16, inputs in bfloat16 are computed in bfloat16, with state and sums in float32. Otherwise, and in float16,
they are converted to float32.

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `S` number of directions, `D` hidden size, `G`
gates of the cell, `J` biases of a unit. Direction codes are those of `sequencer.ops.fused`.
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sequencer.ops import products, reference
from sequencer.ops.cache import cache_folder, digest
from sequencer.processor import processor_flags

SOURCE = Path(__file__).with_name("recurrence.cpp")
HEADER = Path(__file__).with_name("vectors.h")
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
INSTRUCTIONS = {"AVX2": "-march=x86-64-v3", "AVX512": "-march=x86-64-v4"}  # by the capability that torch reports
CELLS = ("lstm", "gru", "rnn", "rnn_relu", "indylstm")
PLAIN = ("rnn", "rnn_relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 2**20  # gate values (4 MiB) a thread computes before the kernel reads them, so that they are still in cache

_SIZE, _POINTER = ctypes.c_ssize_t, ctypes.c_void_p


class _Map(ctypes.Structure):
    _fields_ = (*((name, _SIZE) for name in ("B", "H", "W", "D", "S", "tile", "threads")), ("directions", _POINTER))


class _Forward(ctypes.Structure):
    _fields_ = (
        ("map", _Map),
        *((name, _POINTER) for name in ("bias", "weight", "gates", "out", "cells")),
    )


class _Backward(ctypes.Structure):
    _fields_ = (
        ("map", _Map),
        *((name, _POINTER) for name in ("weight", "gates", "cells", "out", "grad_out")),
        *((name, _POINTER) for name in ("grad_gates", "grad_recurrent", "previous", "grad_bias", "grad_diagonal")),
    )


@functools.cache
def unavailable(cell: str = "lstm", dtype: torch.dtype = torch.float32) -> str | None:
    """Returns why the kernel is not available on this machine, or None if it is; builds it at the first call."""
    try:
        _library(cell, compute_dtype(dtype, cell))
    except subprocess.CalledProcessError as error:
        return f"the C++ compiler failed: {error.stderr.strip().splitlines()[-1] if error.stderr else error}"
    except OSError as error:
        return str(error)
    return None


def has_bfloat16() -> bool:
    """Returns whether torch uses AVX-512, and processor and compiler have AVX512-BF16."""
    narrow = "avx512_bf16" in processor_flags() and _compiles(os.environ.get("CXX", "c++"), "-mavx512bf16")
    return narrow and torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def has_tiles() -> bool:
    """Returns whether processor and compiler have AMX for bfloat16, and the system lets this process use it."""
    if "amx_bf16" not in processor_flags() or not _compiles(os.environ.get("CXX", "c++"), "-mamx-bf16"):
        return False
    request = (158, 0x1023, 18)  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return ctypes.CDLL(None).syscall(*request) == 0


@functools.cache
def _compiles(compiler: str, option: str) -> bool:
    """Returns whether a compiler knows an option."""
    command = [compiler, option, "-fsyntax-only", "-x", "c++", "-"]
    return (
        shutil.which(compiler) is not None and subprocess.run(command, input=b"", capture_output=True).returncode == 0
    )


def compute_dtype(dtype: torch.dtype, cell: str = "lstm") -> torch.dtype:
    """Returns the dtype in which inputs of `dtype` are computed, and gates and cells are kept.

    The derivatives of a plain RNN are functions of its outputs, for which bfloat16 is too coarse.
    """
    narrow = dtype == torch.bfloat16 and cell not in PLAIN and has_bfloat16()
    return torch.bfloat16 if narrow else torch.float32


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which gates and cells are kept for the backward pass, for inputs of `dtype`."""
    return compute_dtype(dtype)


@functools.cache
def _library(cell: str, dtype: torch.dtype) -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build(cell, dtype)))
    library.vectors.argtypes = library.depth.argtypes = [_SIZE]
    library.checksum.argtypes = [_POINTER, _POINTER, _SIZE, _SIZE]
    library.checksum.restype = ctypes.c_uint
    library.forward.argtypes = library.backward.argtypes = [_POINTER]
    return library


def _build(cell: str, dtype: torch.dtype) -> Path:
    """Returns the path of the shared library for this machine's instruction set; compiles it if it is not cached.

    Raises:
        OSError: The system is not Linux, there is no compiler, or the cache folder cannot be written.
        subprocess.CalledProcessError: The compiler failed.
    """
    if platform.system() != "Linux":
        raise OSError("the kernel is built on Linux only")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise OSError("no C++ compiler on the PATH")
    instructions = INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability())
    command = [compiler, *FLAGS, f"-DCELL={cell.upper()}", *([instructions] if instructions else [])]
    if dtype == torch.bfloat16:
        command += ["-DSCALAR=bfloat16", "-mavx512bf16", *(["-mamx-tile", "-mamx-bf16"] if has_tiles() else [])]
    else:
        command += ["-DSCALAR=float"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    identity = [SOURCE.read_text(), HEADER.read_text(), *command, version, platform.machine()]
    library = cache_folder() / f"recurrence-{digest(*identity)}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:  # several processes may build it at a time
            built = Path(scratch) / library.name
            subprocess.run([*command, str(SOURCE), "-o", str(built)], capture_output=True, text=True, check=True)
            built.replace(library)
    return library


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
    S, D, library = weight_hh.shape[0], weight_hh.shape[2], _library(cell, dtype)
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
    S, D, library = weight_hh.shape[0], weight_hh.shape[2], _library(cell, dtype)
    lanes, padding, pair = library.lanes(), -D % library.padding(), 1 + (dtype == torch.bfloat16)
    padded = F.pad(weight_hh.to(dtype).view(S, -1, D, D), (0, padding, 0, padding))
    rows = padded.shape[1] * padded.shape[2]
    return padded.view(S, rows // pair, pair, -1, library.vectors(D) * lanes).permute(0, 3, 1, 4, 2).contiguous()


def checksum(tensors: Sequence[Tensor], cell: str, dtype: torch.dtype) -> int:
    """Returns a checksum of the bits of contiguous tensors, by which changes of their values are detected.

    The cell and the dtype are those of the layer, whose kernel's library computes it.
    """
    pointers = (_POINTER * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    sizes = (_SIZE * len(tensors))(*(tensor.nbytes for tensor in tensors))
    library = _library(cell, compute_dtype(dtype, cell))
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
    library, scratch = _library(cell, dtype), None
    for rows, images in _chunks(library, x, directions, G * D):
        if scratch is None:
            scratch = tokens.new_empty(images * H * W if in_place and not save else 0, S * G * D)
        target = gates[rows] if gates is not None else scratch[: images * H * W]
        if in_place:
            torch.mm(tokens[rows], weight.t(), out=target)
        elif not save:
            target = products.PRODUCTS[project](tokens[rows], weight, None)
        call = _Forward(
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
    packed, library = _pack_backward(weight_hh, cell), _library(cell, dtype)
    grad_x, grad_ih = torch.empty_like(tokens), torch.zeros_like(weight, dtype=torch.float32)
    grad_hh = torch.zeros_like(weight_hh, dtype=torch.float32)
    grad_bias = torch.zeros_like(bias, dtype=torch.float32)
    chosen = products.choice(dtype)
    recurrent = 2 if cell == "gru" else G  # gates whose input and recurrent terms have the same gradient
    scratch: list[Tensor] = []
    for rows, images in _chunks(library, x, directions, G * D):
        size = _map(library, images, H, W, D, directions)
        if not scratch:
            scratch = [tokens.new_empty(images * H * W, S * n * D) for n in (G, G - recurrent, 1)]
        grad_gates, grad_recurrent, previous = (buffer[: images * H * W] for buffer in scratch)
        counts = [-(-images * (W if direction < 2 else H) // size.tile) for direction in directions]
        bias_sums = grad_bias.new_empty(sum(counts), J * D)
        diagonal_sums = torch.empty_like(bias_sums) if cell == "indylstm" else None
        call = _Backward(
            size,
            packed.data_ptr(),
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


def _map(library: ctypes.CDLL, B: int, H: int, W: int, D: int, directions: Sequence[int]) -> _Map:
    """Describes the token map to the kernel; the tile is small enough that every thread has work, if possible."""
    threads = torch.get_num_threads()
    sequences = sum(B * (W if direction < 2 else H) for direction in directions)
    tile = max(1, min(library.max_tile(), sequences // threads))
    codes = (_SIZE * len(directions))(*directions)
    size = _Map(B, H, W, D, len(directions), tile, threads, ctypes.cast(codes, _POINTER))
    size.keep_alive = codes  # the structure holds only their address
    return size


def _chunks(library: ctypes.CDLL, x: Tensor, directions: Sequence[int], columns: int) -> Iterator[tuple[slice, int]]:
    """Splits the batch into chunks of a few images; yields the token rows and the number of images of each.

    The first chunk is the largest. `columns` are the gate values of a token and direction.
    """
    B, H, W, _ = x.shape
    threads = torch.get_num_threads()
    sequences = sum(W if direction < 2 else H for direction in directions)
    step = max(CHUNK * threads // (H * W * len(directions) * columns), -(-library.max_tile() * threads // sequences), 1)
    for first in range(0, B, step):
        images = min(step, B - first)
        yield slice(first * H * W, (first + images) * H * W), images
