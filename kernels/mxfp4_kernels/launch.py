"""Launching a kernel again: what Triton works out at every launch, worked out once.

Triton looks at every argument (its type, whether 16 divides it), parses the options and finds the compiled kernel: 20 us of
Python on a fast host and 80 on a slow one, longer than many of these kernels run. Host code here prepares once what depends on
shapes, strides, dtypes and recipes alone, and keeps it in `Prepared`. Then only addresses change from launch to launch, and of
these it only matters that 16 divides them; so a `Launch` goes through Triton once, keeps the compiled kernel that it answers
with, and hands it addresses from then on.

Whatever is out of the ordinary goes through Triton as ever: another address, a hook or a profiler at Triton's launches, the
interpreter, a Triton whose compiled kernels look different, `MXFP4_DIRECT_LAUNCH=0`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver

_runtime = knobs.runtime
_HANDS_ON = triton.__version__.startswith("3.6.")  # CudaLauncher's call adds what is known: skip it
direct = os.environ.get("MXFP4_DIRECT_LAUNCH", "1") != "0"  # False: every launch goes through Triton


class Prepared(dict):
    """What was prepared, by a key; a thousand, then it starts anew: tokens come in any number."""

    def keep(self, key: Any, value: Any) -> Any:
        """Keep the value under a key, and return it."""
        if len(self) >= 1024:
            self.clear()
        self[key] = value
        return value


class Part(NamedTuple):
    """A pointer of a kernel: the number of a tensor among a launch's, and where in it, in bytes, read as another dtype."""

    tensor: int
    start: int = 0
    dtype: torch.dtype | None = None

    def of(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """A tensor that starts there."""
        tensor = tensors[self.tensor]
        return tensor if self.dtype is None else tensor.view(torch.uint8).flatten()[self.start :].view(self.dtype)


class Launch:
    """A kernel's launch, all but its tensors.

    Args:
        kernel: whose parameters are pointers, then numbers, then constants.
        grid: how many programs.
        pointers: a `Part` for every pointer, or None.
        numbers: the other arguments that are no constants.
        constants: by name, and Triton's options.
    """

    def __init__(self, kernel, grid: tuple[int, ...], pointers: Sequence[Part | None], numbers=(), **constants):
        self.kernel, self.grid, self.pointers, self.numbers, self.constants = kernel, grid, pointers, numbers, constants
        self._run = None

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the tensors' device, the same one and with the same dtypes every time."""
        if self._run is None or not direct or self._current() != self._device or self._hooks or _watched():
            return self._through_triton(tensors)
        addresses = [tensor.data_ptr() for tensor in tensors]
        bits = 0
        for address in addresses:
            bits |= address
        if bits & 15:
            return self._through_triton(tensors)
        pointers = [addresses[tensor] + start for tensor, start in self._places]
        self._run(*self._grid, self._stream(self._device), *self._compiled, *pointers, *self._rest)

    def _through_triton(self, tensors: Sequence[torch.Tensor]) -> None:
        pointers = [part and part.of(tensors) for part in self.pointers]
        with torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else contextlib.nullcontext():
            compiled = self.kernel[self.grid](*pointers, *self.numbers, **self.constants)
            if self._run is None and not any(p is not None and p.data_ptr() % 16 for p in pointers):
                self._keep(compiled)

    def _keep(self, compiled) -> None:
        """Prepare what `JITFunction.run` hands to a compiled kernel, but for hooks."""
        known = all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata"))
        if not known or not hasattr(self.kernel, "pre_run_hooks") or any(part and part.start % 16 for part in self.pointers):
            return
        self._hooks = self.kernel.pre_run_hooks
        # Where None was is compiled in: anything can stand for it.
        self._places = [part[:2] if part else (0, 0) for part in self.pointers]
        constants = self.kernel.arg_names[len(self.pointers) + len(self.numbers) :]
        self._rest = *self.numbers, *(self.constants[name] for name in constants)
        self._grid = (*self.grid, 1, 1)[:3]
        self._current, self._stream = driver.active.get_current_device, driver.active.get_current_stream
        self._device = self._current()
        run, handed = compiled.run, (compiled.packed_metadata, None, None, None)
        if _HANDS_ON and type(run).__name__ == "CudaLauncher" and not (run.global_scratch_size or run.profile_scratch_size):
            run, handed = run.launch, (run.launch_cooperative_grid, run.launch_pdl, None, None, *handed)
        self._compiled = compiled.function, *handed
        self._run = run  # last: other threads look at it


def _watched() -> bool:
    """Whether somebody's hooks want to see launches."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous vector or matrix to be written."""
    if _empty_strided is None or not direct or device.type != "cuda" or device.index != torch.cuda.current_device():
        return torch.empty(size, dtype=dtype, device=device)
    return _empty_strided(size, (1,) if len(size) == 1 else (size[1] or 1, 1), dtype)


def zeros(count: int, device: torch.device) -> torch.Tensor:
    """So many int32."""
    if _memset is not None and direct and count and device.type == "cuda" and device.index == torch.cuda.current_device():
        memory = empty((count,), torch.int32, device)
        if _memset(memory.data_ptr(), 0, count, torch._C._cuda_getCurrentRawStream(device.index)) == 0:
            return memory
    return torch.zeros(count, dtype=torch.int32, device=device)


try:  # Inductor's way to an empty tensor on the current device: a third of the time of `torch.empty`
    from torch._C._dynamo.guards import _empty_strided_cuda as _empty_strided
except ImportError:
    _empty_strided = None
try:  # the driver's: PyTorch fills with a kernel, by way of its dispatcher
    _memset = ctypes.CDLL("libcuda.so.1").cuMemsetD32Async
    _memset.argtypes = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_size_t, ctypes.c_void_p
except (OSError, AttributeError):
    _memset = None
