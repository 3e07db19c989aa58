"""The kernel of the CPU backend, `recurrence.cpp`: its compilation and its interface.

The kernel of a cell and dtype is compiled in 2 s by the C++ compiler on the PATH, or the one named by `CXX`. The
library is kept in the user's cache folder (`XDG_CACHE_HOME`), one file for each combination of source, compiler,
instruction set, cell and dtype. It runs on torch's threads, since it uses the OpenMP runtime that torch has loaded.
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from sequencer.ops.cache import cache_folder, digest
from sequencer.processor import processor_flags

SOURCE = Path(__file__).with_name("recurrence.cpp")
HEADER = Path(__file__).with_name("vectors.h")
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
INSTRUCTIONS = {"AVX2": "-march=x86-64-v3", "AVX512": "-march=x86-64-v4"}  # by the capability that torch reports

SIZE, POINTER = ctypes.c_ssize_t, ctypes.c_void_p


class Map(ctypes.Structure):
    _fields_ = (*((name, SIZE) for name in ("B", "H", "W", "D", "S", "tile", "threads")), ("directions", POINTER))


class Forward(ctypes.Structure):
    _fields_ = (
        ("map", Map),
        *((name, POINTER) for name in ("bias", "weight", "gates", "out", "cells")),
    )


class Backward(ctypes.Structure):
    _fields_ = (
        ("map", Map),
        *((name, POINTER) for name in ("weight", "bias", "gates", "cells", "out", "grad_out")),
        *((name, POINTER) for name in ("grad_gates", "grad_recurrent", "previous", "grad_bias", "grad_diagonal")),
    )


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


@functools.cache
def library(cell: str, dtype: torch.dtype) -> ctypes.CDLL:
    """Returns the compiled kernel; `_build` raises what goes wrong."""
    found = ctypes.CDLL(str(_build(cell, dtype)))
    found.vectors.argtypes = found.depth.argtypes = [SIZE]
    found.checksum.argtypes = [POINTER, POINTER, SIZE, SIZE]
    found.checksum.restype = ctypes.c_uint
    found.forward.argtypes = found.backward.argtypes = [POINTER]
    return found


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
