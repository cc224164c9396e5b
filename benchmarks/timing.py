"""Timing that can be compared: candidates take turns in every round, and each call starts with a cold cache."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Timing:
    """Milliseconds of one candidate: percentiles over the rounds, and all of them, in round order."""

    samples: list[float]

    def percentile(self, share: float) -> float:
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    @property
    def median(self) -> float:
        return self.percentile(0.5)


def median_ratio(ours: Timing, other: Timing) -> float:
    """Median over rounds of other / ours: both were timed in the same round, so machine drift cancels."""
    ratios = sorted(b / a for a, b in zip(ours.samples, other.samples, strict=True))
    return ratios[len(ratios) // 2]


class ColdCache:
    """Evicts what the last call left in the caches by writing a buffer larger than they are."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty((256 if device.type == "cuda" else 128) << 20, dtype=torch.uint8, device=device)

    def evict(self) -> None:
        self.buffer.fill_(1)


def interleave(
    candidates: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 3.0,
    least_rounds: int = 5,
    most_rounds: int = 100,
    warm_ups: int = 2,
) -> dict[str, Timing]:
    """Time every candidate once per round until about `seconds` per candidate have passed.

    `warm_ups` calls of each first. Each candidate makes its own inputs fresh, so nothing is timed on a cached result.
    """
    cache = ColdCache(device)
    for candidate in candidates.values():
        for _ in range(warm_ups):
            candidate()
    timings = {name: Timing([]) for name in candidates}
    begin = time.perf_counter()
    gc.collect()
    with _no_gc():
        for done in range(most_rounds):
            if done >= least_rounds and time.perf_counter() - begin > seconds * len(candidates):
                break
            for name, candidate in candidates.items():
                cache.evict()
                timings[name].samples.append(_milliseconds(candidate, device))
    return timings


@contextlib.contextmanager
def _no_gc():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _milliseconds(candidate: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        candidate()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    begin = time.perf_counter()
    candidate()
    return (time.perf_counter() - begin) * 1e3


def peak_memory(candidate: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call needs at its peak beyond what was allocated before; None where it cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        _trim()
        clear.write_text("5")  # resets the high-water mark of the resident set
        before = _kilobytes(status.read_text(), "VmRSS")
        candidate()
        return (_kilobytes(status.read_text(), "VmHWM") - before) * 1024
    except OSError:
        return None


def _trim() -> None:
    """Gives freed memory back to the system, so that a later allocation shows in the resident set."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _kilobytes(status: str, field: str) -> int:
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field + ":"))
