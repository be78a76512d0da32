"""Saving CUDA tensors: copied by the device straight into pinned staging memory, with one wait at the end.

A tensor's ``.cpu()`` would copy it twice, into fresh, pageable memory and from there into staging memory, and wait each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from s3loader.adapters import Device

__all__ = ["device_of"]


class _Cuda:
    """What is asked of torch.cuda; tests put something in its place that needs no GPU."""

    types = ("cuda",)

    @staticmethod
    def pinned(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    @staticmethod
    def stream(device: torch.device) -> Any:
        """The stream that computes on it now: its copies see what was computed before, and no temporary is reused too early."""
        return torch.cuda.current_stream(device)

    @staticmethod
    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)


_cuda: Any = _Cuda


class _OnDevice:
    """A tensor there, as `Device` has it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def memory(self, size: int) -> memoryview:
        pinned: Any = _cuda.pinned(size).numpy()  # typed as no Buffer before Python 3.12
        return memoryview(pinned)

    def fetch(self) -> Callable[[memoryview, int], Callable[[], None]]:
        flat = self._tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        wait = _wait_for(_cuda.stream(flat.device))

        def begin(target: memoryview, start: int) -> Callable[[], None]:
            _cuda.copy(torch.frombuffer(target, dtype=torch.uint8), flat[start : start + len(target)])
            return wait

        return begin


@functools.lru_cache(64)
def _wait_for(stream: Any) -> Callable[[], None]:
    """The same function for the same stream, so that it is waited for once."""
    wait: Callable[[], None] = stream.synchronize
    return wait


def device_of(tensor: torch.Tensor) -> Device | None:
    """How the device of `tensor` copies it; None where that is done by the processor (or by ``.cpu()``)."""
    return _OnDevice(tensor) if tensor.device.type in _cuda.types else None
