"""LSTM and IndyLSTM on a CPU: matrix products by torch, the scans over time by the kernel in `recurrence.cpp`.

The kernel is compiled in 2 s by the C++ compiler on the PATH, or the one named by `CXX`. The library is kept in the
user's cache folder (`XDG_CACHE_HOME`), one file for each combination of source, compiler and instruction set. The
kernel runs on torch's threads, since it uses the OpenMP runtime that torch has loaded. Computations are in float32;
inputs of narrower dtypes are converted.

Shape letters: `B` batch, `H W` token rows and columns, `C` channels, `S` number of directions, `D` hidden size.
Direction codes are those of `sequencer.ops.fused`.
"""

import ctypes
import functools
import hashlib
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

SOURCE = Path(__file__).with_name("recurrence.cpp")
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
INSTRUCTIONS = {"AVX2": "-march=x86-64-v3", "AVX512": "-march=x86-64-v4"}  # by the capability that torch reports
CELLS = ("lstm", "indylstm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 2**20  # gate values (4 MiB) a thread computes before the kernel reads them, so that they are still in cache

_SIZE, _POINTER = ctypes.c_ssize_t, ctypes.c_void_p


class _Map(ctypes.Structure):
    _fields_ = (*((name, _SIZE) for name in ("B", "H", "W", "D", "S", "tile", "threads")), ("directions", _POINTER))


class _Forward(ctypes.Structure):
    _fields_ = (
        ("map", _Map),
        *((name, _POINTER) for name in ("bias", "weight", "gates", "out", "cells")),
        ("diagonal", ctypes.c_bool),
    )


class _Backward(ctypes.Structure):
    _fields_ = (
        ("map", _Map),
        *((name, _POINTER) for name in ("weight", "gates", "cells", "out", "grad_out")),
        *((name, _POINTER) for name in ("grad_gates", "previous", "grad_bias", "grad_diagonal")),
        ("diagonal", ctypes.c_bool),
    )


@functools.cache
def unavailable() -> str | None:
    """Returns why the kernel is not available on this machine, or None if it is; builds it at the first call."""
    try:
        _library()
    except subprocess.CalledProcessError as error:
        return f"the C++ compiler failed: {error.stderr.strip().splitlines()[-1] if error.stderr else error}"
    except OSError as error:
        return str(error)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build()))
    library.vectors.argtypes = [_SIZE]
    library.checksum.argtypes = [_POINTER, _POINTER, _SIZE, _SIZE]
    library.checksum.restype = ctypes.c_uint
    library.forward.argtypes = library.backward.argtypes = [_POINTER]
    return library


def _build() -> Path:
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
    command = [compiler, *FLAGS, *([instructions] if instructions else [])]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *command, version, platform.machine()]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sequencer"
    library = folder / f"recurrence-{key[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several processes may build it at the same time
            built = Path(scratch) / library.name
            subprocess.run([*command, str(SOURCE), "-o", str(built)], capture_output=True, text=True, check=True)
            built.replace(library)
    return library


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which gates and cells are kept for the backward pass, for inputs of `dtype`."""
    return torch.float32


def pack(weight_hh: Tensor) -> Tensor:
    """Converts recurrent weights to the layout that the forward pass reads, in float32.

    Args:
        weight_hh: Weights `[S, 4D, D]`, or diagonals `[S, 4D]`, whose layout is kept.

    Returns:
        Layout `[S, blocks, D, 4, lanes]`: `lanes` is the number of floats in a vector register, and a block is `lanes`
        consecutive units (rows), padded with zeros. Within a block, the weights of unit k of the previous step are
        contiguous for all four gates.
    """
    weight_hh = weight_hh.float()
    if weight_hh.dim() == 2:
        return weight_hh.contiguous()
    S, D, lanes = weight_hh.shape[0], weight_hh.shape[2], _library().lanes()
    padded = F.pad(weight_hh.view(S, 4, D, D), (0, 0, 0, -D % lanes))
    return padded.view(S, 4, -1, lanes, D).permute(0, 2, 4, 1, 3).contiguous()


def _pack_backward(weight_hh: Tensor) -> Tensor:
    """Converts recurrent weights `[S, 4D, D]` to the layout that the backward pass reads, in float32.

    Layout `[S, blocks, 4P, V * lanes]`: `P` is D padded with zeros to a multiple of `lanes`, and a block is `V * lanes`
    consecutive units of the previous step (columns). Within a block, the weights of one gate row of the next step are
    contiguous. Diagonals `[S, 4D]` keep their layout.
    """
    weight_hh = weight_hh.float()
    if weight_hh.dim() == 2:
        return weight_hh.contiguous()
    S, D, lanes = weight_hh.shape[0], weight_hh.shape[2], _library().lanes()
    padded = F.pad(weight_hh.view(S, 4, D, D), (0, -D % lanes, 0, -D % lanes))
    P = padded.shape[-1]
    return padded.view(S, 4 * P, -1, _library().vectors(D) * lanes).permute(0, 2, 1, 3).contiguous()


def checksum(tensors: Sequence[Tensor]) -> int:
    """Returns a checksum of the bits of contiguous tensors, by which changes of their values are detected.

    The size of each tensor must be a multiple of 4 bytes, as that of weights of four gates is in every dtype.
    """
    pointers = (_POINTER * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    words = (_SIZE * len(tensors))(*(tensor.nbytes // 4 for tensor in tensors))
    return _library().checksum(pointers, words, len(tensors), torch.get_num_threads())


def forward(
    x: Tensor, weight_ih: Tensor, packed: Tensor, bias: Tensor, cell: str, directions: Sequence[int], save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Runs one layer in all directions, from a zero state.

    Args:
        x: Token map `[B, H, W, C]`.
        weight_ih: Input weights `[S 4D, C]`.
        packed: Recurrent weights as returned by `pack`.
        bias: Biases `[S, 4D]`.
        cell: One of `CELLS`.
        directions: `S` direction codes.
        save: If True, gates and cells are returned for the backward pass.

    Returns:
        Outputs `[B, H, W, S D]` in the dtype of `x`, then gates `[B H W, S 4D]` and cells `[B H W, S D]` in float32, or
        None for both.
    """
    B, H, W, _ = x.shape
    S, D = len(directions), bias.numel() // len(directions) // 4
    tokens, projection, bias = _rows(x), weight_ih.float().t(), bias.float().contiguous()
    out = tokens.new_empty(B * H * W, S * D)
    gates = tokens.new_empty(B * H * W, S * 4 * D) if save else None
    cells = torch.empty_like(out) if save else None
    scratch = None
    for rows, images in _chunks(x, directions, D):
        if scratch is None:
            scratch = tokens.new_empty(0 if save else images * H * W, S * 4 * D)
        target = gates[rows] if gates is not None else scratch[: images * H * W]
        torch.mm(tokens[rows], projection, out=target)
        call = _Forward(
            _map(images, H, W, D, directions),
            bias.data_ptr(),
            packed.data_ptr(),
            target.data_ptr(),
            out[rows].data_ptr(),
            None if cells is None else cells[rows].data_ptr(),
            cell == "indylstm",
        )
        _library().forward(ctypes.byref(call))
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
    S, D, diagonal = len(directions), out.shape[-1] // len(directions), cell == "indylstm"
    tokens, outputs, grad_outputs, weight = _rows(x), _rows(out), _rows(grad_out), weight_ih.float()
    packed = _pack_backward(weight_hh)
    grad_x, grad_ih = torch.empty_like(tokens), torch.zeros_like(weight)
    grad_hh = torch.zeros_like(weight_hh, dtype=torch.float32)
    grad_bias = tokens.new_zeros(S, 4 * D)
    scratch: list[Tensor] = []
    for rows, images in _chunks(x, directions, D):
        size = _map(images, H, W, D, directions)
        if not scratch:
            scratch = [tokens.new_empty(images * H * W, S * width) for width in (4 * D, D)]
        grad_gates, previous = (buffer[: images * H * W] for buffer in scratch)
        counts = [-(-images * (W if direction < 2 else H) // size.tile) for direction in directions]
        bias_sums = tokens.new_empty(sum(counts), 4 * D)
        diagonal_sums = torch.empty_like(bias_sums) if diagonal else None
        call = _Backward(
            size,
            packed.data_ptr(),
            *(t[rows].data_ptr() for t in (gates, cells, outputs, grad_outputs)),
            *(None if t is None else t.data_ptr() for t in (grad_gates, previous, bias_sums, diagonal_sums)),
            diagonal,
        )
        _library().backward(ctypes.byref(call))
        torch.mm(grad_gates, weight, out=grad_x[rows])
        grad_ih.addmm_(grad_gates.t(), tokens[rows])
        grad_bias += torch.stack([part.sum(0) for part in bias_sums.split(counts)])
        if diagonal_sums is not None:
            grad_hh += torch.stack([part.sum(0) for part in diagonal_sums.split(counts)])
            continue
        for s in range(S):
            grad_hh[s].addmm_(grad_gates[:, s * 4 * D : (s + 1) * 4 * D].t(), previous[:, s * D : (s + 1) * D])
    return (
        grad_x.view_as(x).to(x.dtype),
        grad_ih.to(weight_ih.dtype),
        grad_hh.to(weight_hh.dtype),
        grad_bias.to(weight_ih.dtype),
    )


def _rows(x: Tensor) -> Tensor:
    """Returns `[B, H, W, C]` as contiguous float32 `[tokens, C]`."""
    return x.reshape(-1, x.shape[-1]).float().contiguous()


def _map(B: int, H: int, W: int, D: int, directions: Sequence[int]) -> _Map:
    """Describes the token map to the kernel; the tile is small enough that every thread has work, if possible."""
    threads = torch.get_num_threads()
    sequences = sum(B * (W if direction < 2 else H) for direction in directions)
    tile = max(1, min(_library().max_tile(), sequences // threads))
    codes = (_SIZE * len(directions))(*directions)
    size = _Map(B, H, W, D, len(directions), tile, threads, ctypes.cast(codes, _POINTER))
    size.keep_alive = codes  # the structure holds only their address
    return size


def _chunks(x: Tensor, directions: Sequence[int], D: int) -> Iterator[tuple[slice, int]]:
    """Splits the batch into chunks of a few images; yields the token rows and the number of images of each.

    The first chunk is the largest.
    """
    B, H, W, _ = x.shape
    threads = torch.get_num_threads()
    sequences = sum(W if direction < 2 else H for direction in directions)
    step = max(
        CHUNK * threads // (H * W * len(directions) * 4 * D), -(-_library().max_tile() * threads // sequences), 1
    )
    for first in range(0, B, step):
        images = min(step, B - first)
        yield slice(first * H * W, (first + images) * H * W), images
