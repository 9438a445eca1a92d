"""What this process has of the machine: CPUs, threads that work ahead, memory that it keeps, signals that it notes."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# What decides the speed, in /proc/cpuinfo's words.
FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")

BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # any of them: products of bfloat16 are faster than those of float32


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


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are put into the list instead of striking wherever the program is; at the end of the block
    the first of them takes its usual course. A second one does so at once."""
    noted: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # Python lets no other one set handlers
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
    handlers = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}  # None: not set by Python

    def note(number: int, _: object) -> None:
        noted.append(number)
        restore()

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    for number in handlers:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()
    if noted:
        signal.raise_signal(noted[0])
        raise KeyboardInterrupt  # where a handler of the caller's returns
