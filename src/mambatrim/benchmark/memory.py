"""How much memory a forward pass needs, beyond the weights and its input."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forward_memory(function: Callable[[], object]) -> int | None:
    """Bytes by which memory grows, at its peak, while `function` runs; None where the system does not tell.

    On Linux this is memory that the process really occupied: freed memory is first given back, then the kernel's own
    record of the largest resident size is reset, and read again after the call. Temporaries of C++ code count, memory
    that was reserved and never touched does not. glibc is asked (from now on, until `timing` asks otherwise) to give
    large temporaries back when they are freed, for otherwise holes between them count. On a GPU it is what PyTorch's
    allocator handed out.
    One call before it is not measured: it loads code, and lets libraries make what they keep. The measured one runs in
    a thread of its own, so that what our kernels keep for a thread counts as well.
    """
    _give_back()
    function()
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _give_back()
        _RESET.write_text("5")  # 5: the peak, see proc(5)
        before = _resident("VmRSS")
        _in_a_new_thread(function)
        return max(0, _resident("VmHWM") - before)
    except (OSError, ValueError):
        return None


def _in_a_new_thread(function: Callable[[], object]) -> None:
    """Call it with the settings of this thread, which are not those of all."""
    threads, grad, inference = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run() -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            function()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def _resident(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise ValueError(f"{_STATUS} has no {field}")


def _give_back() -> None:
    """Return freed memory to the system, now and whenever 64 KiB or more are freed, where glibc can be asked."""
    if os.name != "posix":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_MMAP_THRESHOLD, 1 << 16)
        library.malloc_trim(0)
