"""What this process has of the machine: which CPU, how many of them, threads that work ahead, memory that it keeps."""

from __future__ import annotations

import functools
import os
import platform
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# What decides the speed, in /proc/cpuinfo's words.
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")


@functools.cache
def cpu() -> tuple[str, frozenset[str]]:
    """Name and feature flags in the words of /proc/cpuinfo; no flags where that does not exist."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    flags = facts.get("flags", facts.get("Features", "")).split()
    return facts.get("model name", platform.processor() or platform.machine()), frozenset(flags)


def usable_cpus() -> int:
    """How many CPUs this process may run on: fewer than there are under taskset, in a container or a batch job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work_ahead(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, depth: int
) -> Generator[tuple[Item, Future[Result]], None, None]:
    """Each item with the future of work(item), in the order of `items`, while `workers` threads compute the next ones.

    At most `depth` are under way, so memory is bounded, unlike with Executor.map. When the generator is closed, what
    has not begun never begins, and what has is not waited for.
    """
    pool = ThreadPoolExecutor(workers)
    under_way: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            under_way.append((item, pool.submit(work, item)))
            if len(under_way) == depth:
                yield under_way.popleft()
        while under_way:
            yield under_way.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=bool(under_way))


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, for the activations of the next layer or training step.

    glibc hands what is freed back to the kernel beyond a threshold that follows the largest block ever freed. Without
    this untouched one, every layer faults its activations in anew: a quarter of ssam_tiny's time. Elsewhere a no-op.
    """
    bytes(31 << 20)  # from calloc, so no page of it is ever touched
