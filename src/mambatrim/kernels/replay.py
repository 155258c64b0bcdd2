"""Kernels that follow each other, recorded once and run again without what Python does between them.

At one image of a narrow model Python is a tenth of the time, because after every kernel all that it needs has to be
fetched from memory again. What a function of one tensor does is recorded as the calls of kernels that it makes:
everything else that PyTorch calculates on the way is seen too (`torch.utils._python_dispatch`), and where it depends on
the tensor there is no recording.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import cpu

MOST_BYTES = 16 << 20  # that a recording may keep


class Recorder(TorchDispatchMode):
    """Sees what PyTorch calculates, keeps all tensors that are made, and says whether all of it is in `calls`.

    Args:
        fixed: tensors that do not change.
    """

    def __init__(self, fixed: Sequence[Tensor]) -> None:
        super().__init__()
        self.calls: list[cpu.Call] = []
        self.kept: list[Tensor] = []
        self.complete = True
        self._fixed = _memories(fixed)

    def __enter__(self) -> Recorder:
        super().__enter__()
        cpu.watch(self.calls)
        return self

    def __exit__(self, *error: Any) -> None:
        cpu.watch(None)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = _memories((args, kwargs)), _memories(result)
        changes = func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags
        self.kept += _tensors(result)
        # memory for a kernel, or another view
        if "empty" in func._schema.name or (made and made <= given and not changes):
            return result
        if changes or not given <= self._fixed:
            self.complete = False
        self._fixed |= made
        return result


class Replay:
    """What a function did with x. Called with another x of its shape, it does the same.

    What a function reads past PyTorch, as by `tolist`, no recording sees. So the first result is compared with the
    function's own, to the bit.
    """

    def __init__(self, recorder: Recorder, x: Tensor, y: Tensor) -> None:
        self._calls, self._kept, self._y = recorder.calls, recorder.kept, y
        # where the records name x
        self._named = [[at for at, offset in _inside(record, x) if not offset] for _, record in self._calls]
        self._lock = threading.Lock()
        self._right: bool | None = None  # not known yet

    def __call__(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """run(x), the function that was recorded; by itself where the recording is in use by another thread, or
        wrong."""
        if self._right is False or not self._lock.acquire(blocking=False):
            return run(x)
        try:
            y = self._again(x)
            if self._right is None:
                expected = run(x)
                self._right = torch.equal(y, expected)
                return expected
            return y
        finally:
            self._lock.release()

    def _again(self, x: Tensor) -> Tensor:
        address = struct.pack("<q", x.data_ptr())
        for (name, record), named in zip(self._calls, self._named, strict=True):
            for at in named:
                record = b"".join((record[:at], address, record[at + 8 :]))
            cpu.call(name, record)
        return self._y.clone()


def record(run: Callable[[Tensor], Tensor], x: Tensor, fixed: Sequence[Tensor]) -> tuple[Tensor, Replay | None]:
    """run(x), and how to do it again; None where that cannot be, or would keep more than MOST_BYTES.

    Args:
        x: contiguous, on a CPU.
        fixed: tensors that `run` reads and that never change.
    """
    with Recorder(fixed) as recorder:
        y = run(x)
    own = {_memory(one): one.untyped_storage().nbytes() for one in recorder.kept}
    size = sum(own[memory] for memory in own.keys() - _memories((x, fixed)))
    known = all(not offset for _, record in recorder.calls for _, offset in _inside(record, x))
    if not (recorder.complete and known) or size > MOST_BYTES or _memory(y) not in _memories(recorder.kept):
        return y, None
    # y stays with who asked
    return y.clone(), Replay(recorder, x, y)


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


def _memories(values: Any) -> set[int]:
    return {_memory(one) for one in _tensors(values)}


def _inside(record: bytes, x: Tensor) -> list[tuple[int, int]]:
    """Where a record names an address in the memory of x, and how far from its start."""
    numbers, first = struct.unpack(f"<{len(record) // 8}q", record), x.data_ptr()
    return [(8 * i, number - first) for i, number in enumerate(numbers) if 0 <= number - first < x.nbytes]


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
