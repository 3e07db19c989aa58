"""LSTM and IndyLSTM on a CPU: matrix products by torch, what lies between them by `recurrence.cpp`, compiled once.

The kernel takes 2 s to build with the C++ compiler on the PATH (`CXX` names another) and is kept in the user's cache
folder (`XDG_CACHE_HOME`), one file for each source, compiler and instruction set. Threads are torch's own: the
OpenMP runtime that torch has loaded serves the kernel too. Everything is computed in float32; narrower inputs are
widened first.
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
INSTRUCTIONS = {"AVX2": "-march=x86-64-v3", "AVX512": "-march=x86-64-v4"}  # by what torch's own kernels use
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 2**20  # gates a thread has in flight, 4 MiB: what is written is read again before it leaves the cache

_SIZE, _POINTER = ctypes.c_ssize_t, ctypes.c_void_p


class _Map(ctypes.Structure):
    _fields_ = (*((name, _SIZE) for name in ("B", "H", "W", "D", "S", "tile", "threads")), ("sweeps", _POINTER))


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
    """Why the kernel cannot be had on this machine; None where it can. Builds it where that has not been done."""
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
    """The shared library for this machine's instruction set.

    Raises:
        OSError: no compiler, or the cache folder cannot be written.
        subprocess.CalledProcessError: the compiler refused.
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
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several processes may build at once
            built = Path(scratch) / library.name
            subprocess.run([*command, str(SOURCE), "-o", str(built)], capture_output=True, text=True, check=True)
            built.replace(library)
    return library


def saved_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gates and cells are kept in between the forward and the backward pass, for inputs of `dtype`."""
    return torch.float32


def pack(weight_hh: Tensor) -> Tensor:
    """Recurrent weights `[S, 4D, D]` as the forward pass reads them; a diagonal `[S, 4D]` as it is.

    Blocks of vectors of units, of each first what its four gates take from unit 0 of the step before, then from 1...
    """
    weight_hh = weight_hh.float()
    if weight_hh.dim() == 2:
        return weight_hh.contiguous()
    S, D, lanes = weight_hh.shape[0], weight_hh.shape[2], _library().lanes()
    padded = F.pad(weight_hh.view(S, 4, D, D), (0, 0, 0, -D % lanes))
    return padded.view(S, 4, -1, lanes, D).permute(0, 2, 4, 1, 3).contiguous()


def _pack_backward(weight_hh: Tensor) -> Tensor:
    """The same for the backward pass: blocks of units, of each what it takes from the gates of the step after."""
    weight_hh = weight_hh.float()
    if weight_hh.dim() == 2:
        return weight_hh.contiguous()
    S, D, lanes = weight_hh.shape[0], weight_hh.shape[2], _library().lanes()
    padded = F.pad(weight_hh.view(S, 4, D, D), (0, -D % lanes, 0, -D % lanes))
    P = padded.shape[-1]
    return padded.view(S, 4 * P, -1, _library().vectors(D) * lanes).permute(0, 2, 1, 3).contiguous()


def checksum(tensors: Sequence[Tensor]) -> int:
    """Of all bits of contiguous float32 tensors: it tells whether anything has been written to them."""
    pointers = (_POINTER * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
    sizes = (_SIZE * len(tensors))(*(tensor.numel() for tensor in tensors))
    return _library().checksum(pointers, sizes, len(tensors), torch.get_num_threads())


def forward(
    x: Tensor, weight_ih: Tensor, packed: Tensor, bias: Tensor, sweeps: Sequence[int], save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Outputs `[B, H, W, S D]` and, to go back from, gates `[B H W, S 4D]` and cells `[B H W, S D]` in float32."""
    B, H, W, _ = x.shape
    S, D = len(sweeps), bias.numel() // len(sweeps) // 4
    tokens, projection, bias = _rows(x), weight_ih.float().t(), bias.float().contiguous()
    out = tokens.new_empty(B * H * W, S * D)
    gates = tokens.new_empty(B * H * W, S * 4 * D) if save else None
    cells = torch.empty_like(out) if save else None
    scratch = None
    for rows, images in _chunks(x, sweeps, D):
        if scratch is None:
            scratch = tokens.new_empty(0 if save else images * H * W, S * 4 * D)
        target = gates[rows] if gates is not None else scratch[: images * H * W]
        torch.mm(tokens[rows], projection, out=target)
        call = _Forward(
            _map(images, H, W, D, sweeps),
            bias.data_ptr(),
            packed.data_ptr(),
            target.data_ptr(),
            out[rows].data_ptr(),
            None if cells is None else cells[rows].data_ptr(),
            packed.dim() == 2,
        )
        _library().forward(ctypes.byref(call))
    return out.view(B, H, W, S * D).to(x.dtype), gates, cells


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    sweeps: Sequence[int],
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight_ih, weight_hh and the bias `[S, 4D]`."""
    _, H, W, _ = x.shape
    S, D, diagonal = len(sweeps), out.shape[-1] // len(sweeps), weight_hh.dim() == 2
    tokens, outputs, grad_outputs, weight = _rows(x), _rows(out), _rows(grad_out), weight_ih.float()
    packed = _pack_backward(weight_hh)
    grad_x, grad_ih = torch.empty_like(tokens), torch.zeros_like(weight)
    grad_hh = torch.zeros_like(weight_hh, dtype=torch.float32)
    grad_bias = tokens.new_zeros(S, 4 * D)
    scratch: list[Tensor] = []
    for rows, images in _chunks(x, sweeps, D):
        size = _map(images, H, W, D, sweeps)
        if not scratch:
            scratch = [tokens.new_empty(images * H * W, S * width) for width in (4 * D, D)]
        grad_gates, previous = (buffer[: images * H * W] for buffer in scratch)
        counts = [-(-images * (W if sweep < 2 else H) // size.tile) for sweep in sweeps]
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
    """`[B, H, W, C]` as `[tokens, C]`, contiguous float32."""
    return x.reshape(-1, x.shape[-1]).float().contiguous()


def _map(B: int, H: int, W: int, D: int, sweeps: Sequence[int]) -> _Map:
    """The problem's size, cut into tiles so that no thread is idle where there are sequences enough."""
    threads = torch.get_num_threads()
    sequences = sum(B * (W if sweep < 2 else H) for sweep in sweeps)
    tile = max(1, min(_library().max_tile(), sequences // threads))
    codes = (_SIZE * len(sweeps))(*sweeps)
    size = _Map(B, H, W, D, len(sweeps), tile, threads, ctypes.cast(codes, _POINTER))
    size.keep_alive = codes
    return size


def _chunks(x: Tensor, sweeps: Sequence[int], D: int) -> Iterator[tuple[slice, int]]:
    """Rows of tokens and number of images, a few images at a time; the first chunk is the largest."""
    B, H, W, _ = x.shape
    threads = torch.get_num_threads()
    sequences = sum(W if sweep < 2 else H for sweep in sweeps)
    step = max(CHUNK * threads // (H * W * len(sweeps) * 4 * D), -(-_library().max_tile() * threads // sequences), 1)
    for first in range(0, B, step):
        images = min(step, B - first)
        yield slice(first * H * W, (first + images) * H * W), images
