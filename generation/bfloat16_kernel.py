"""Our C++ for bfloat16, built by the machine's compiler: called by Python, and by compiled layers."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .bfloat16_source import SOURCE

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared")

# Names that no other version of this code has: a process may hold the package's and a checkpoint's.
KERNEL_VERSION = hashlib.sha256(SOURCE.encode()).hexdigest()[:8]
KERNEL_NAMES = (
    "bfloat16_product",
    "remember_packed",
    "aoti_torch_cpu_packed_product",
    "aoti_torch_cpu_adapted_packed_product",
    "bfloat16_attention",
    "aoti_torch_cpu_bfloat16_attention",
    "mean_of_channels",
    "aoti_torch_cpu_mean_of_channels",
)


class Kernel(NamedTuple):
    """What is called of the C++: its functions of these names."""

    bfloat16_product: Any
    bfloat16_attention: Any
    mean_of_channels: Any
    remember_packed: Any


@cache
def bfloat16_kernel() -> Kernel | str:
    """The compiled functions, or why there are none: built once in a process, by whichever copy of this code asks."""
    if sys.platform == "win32" or sys.byteorder != "little":
        return "ours are for little-endian machines that do not run Windows"
    in_process = ctypes.CDLL(None)
    if not hasattr(in_process, f"bfloat16_product_{KERNEL_VERSION}") and (why := build_kernel()):
        return why
    found = Kernel(*(getattr(in_process, f"{name}_{KERNEL_VERSION}") for name in Kernel._fields))
    address, number = ctypes.c_void_p, ctypes.c_int64
    found.bfloat16_product.argtypes = [address] * 4 + [number] * 4 + [address] * 2 + [number] * 2
    found.bfloat16_attention.argtypes = [address] * 7 + [ctypes.c_float]
    found.mean_of_channels.argtypes = [address] * 2 + [number] * 2
    found.remember_packed.argtypes = [address] * 3 + [number, address]
    for function in found:
        function.restype = None
    return found


def build_kernel() -> str | None:
    """Builds the functions and makes them known to the whole process; or says why that failed. The compiler is the one
    that the environment variable `CXX` names, or the first there is of c++, g++ and clang++."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [name for name in COMPILERS if shutil.which(name)][:1]
    if not compiler:
        return f"ours need a C++ compiler, but none of {', '.join(COMPILERS)} is on the PATH; CXX can name another"
    names = [f"-D{name}={name}_{KERNEL_VERSION}" for name in KERNEL_NAMES]
    torchs = ["-L", str(Path(torch.__file__).with_name("lib")), "-ltorch_cpu"]
    with tempfile.TemporaryDirectory(prefix="wavedraft-") as folder:
        source, library = Path(folder, "product.cpp"), Path(folder, "product.so")
        source.write_text(SOURCE)
        command = [*compiler, *FLAGS, *names, str(source), "-o", str(library), *torchs]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            return f"building ours failed: `{shlex.join(command)}` said {said!r}"
    return None
