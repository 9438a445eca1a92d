"""What this process has of the machine: CPUs, threads that work ahead, memory that it keeps, signals that it notes;
and what it has of others: the actors of a Ray cluster."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import platform
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from .errors import HearSsamError

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


# ---- other machines ------------------------------------------------------------------------------------------------

TRIES = 3  # of an item whose actor is lost, and of starting an actor


class Cluster:
    """Work for the actors of a Ray cluster; from `engine_named`.

    Each GPU is an actor where `device` (auto, cpu, cuda) allows it, else `workers` CPUs of each node (default: all).
    Every node must see the working folder and `folders`, and files by the same names.
    """

    def __init__(self, ray: Any, device: str, workers: int | None, folders: Iterable[Path]) -> None:
        self.ray, self.workers, self.folders = ray, workers, [os.getcwd(), *map(os.path.abspath, folders)]
        best = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
        self.device = best if device == "auto" else device
        self.places(self.device)

    def places(self, device: str) -> list[dict[str, Any]]:
        """Where actors belong, as options of Ray's; raises HearSsamError where the cluster has no such device."""
        affinity = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        places: list[dict[str, Any]] = []
        for node in self.ray.nodes():
            has = int(node["Alive"] and node["Resources"].get("GPU" if device == "cuda" else "CPU", 0))
            count = has if device == "cuda" else min(self.workers or has, has)
            needs = {"num_gpus": 1, "num_cpus": 0} if device == "cuda" else {"num_cpus": has // max(1, count)}
            # soft: elsewhere where the node is gone
            places += [{**needs, "scheduling_strategy": affinity(node["NodeID"], soft=True)}] * count
        if not places:
            lacks = "GPU" if device == "cuda" else "CPU for actors"
            raise HearSsamError(f"--engine ray: the cluster has no {lacks}; add a node, or take another --device.")
        return places

    def work(
        self, build: Callable[[str], Callable[[Item], Result]], items: Iterable[Item], device: str,
        threads: int = 1, idle: Callable[[], object] = lambda: None,
    ) -> Generator[tuple[Item, Future[Result]], None, None]:  # fmt: skip
        """Each item with the finished future of `build(device)(item)`, in the order in which they are finished.

        An actor builds once, then has `threads` items at a time, so memory is bounded. Lost actors (killed, or with
        their node) are replaced and their items given out again, TRIES times at most. `idle` is called every second
        without a result. Functions, items and results travel by pickle.
        """
        ray, fresh = self.ray, ((item, 1) for item in items)
        remote, built = ray.remote(_Actor), ray.put(build)
        waiting: deque[tuple[Item, int]] = deque()  # and which try that is
        alive: dict[Any, dict[str, Any]] = {}  # actors, and their places
        free: list[Any] = []  # actors, once for each thread
        calls: dict[Any, tuple[Any, Item | None, int]] = {}  # None: the actor gets ready

        def start(place: dict[str, Any], tries: int = 1) -> None:
            actor = remote.options(max_concurrency=threads, **place).remote()
            alive[actor] = place
            calls[actor.ready.remote(self.folders, device, built)] = actor, None, tries

        try:
            for place, job in zip(self.places(device), fresh, strict=False):
                waiting.append(job)
                start(place)
            while True:
                while free and (given := waiting.popleft() if waiting else next(fresh, None)):
                    actor = free.pop()
                    calls[actor.work.remote(given[0])] = actor, *given
                if not waiting and all(item is None for _, item, _ in calls.values()):  # all actors may be new ones
                    if (given := next(fresh, None)) is None:
                        return
                    waiting.append(given)
                if not (done := ray.wait(list(calls), timeout=1.0)[0]):
                    idle()
                for call in done:
                    actor, item, tries = calls.pop(call)
                    outcome: Future[Result] = Future()
                    try:
                        outcome.set_result(ray.get(call))
                    except ray.exceptions.RayTaskError as error:  # raised by the work itself
                        outcome.set_exception(error.cause)
                    except ray.exceptions.RayError:
                        if lost := alive.pop(actor, None):  # else another of its calls has told
                            free = [other for other in free if other != actor]
                            ray.kill(actor)
                            start(lost, tries + 1 if item is None else 1)
                        if tries < TRIES:
                            if item is not None:
                                waiting.append((item, tries + 1))
                            continue
                        reason = f"its process was killed or crashed {TRIES} times (out of memory?)"
                        outcome.set_exception(HearSsamError(f"{reason}; run again what is missing."))
                    free += [actor] * (actor in alive) * (threads if item is None else 1)
                    if item is None:
                        outcome.result()
                    else:
                        yield item, outcome
        finally:
            for actor in alive:
                ray.kill(actor)


class _Actor:
    """A process of a cluster."""

    def ready(self, folders: list[str], device: str, build: Callable[[str], Callable[[Any], Any]]) -> None:
        if missing := [folder for folder in folders if not os.path.isdir(folder)]:
            mend = "every node must see it by this name"
            raise HearSsamError(f"{missing[0]}: is not there on the node {platform.node()}; {mend}.")
        os.chdir(folders[0])  # sys.path has it from Ray
        keep_freed_memory()
        self.call = build(device)

    def work(self, item: Any) -> Any:
        return self.call(item)


@contextlib.contextmanager
def engine_named(name: str, device: str, workers: int | None, *folders: Path) -> Iterator[Cluster | None]:
    """What `--engine` names. local: None; ray: the cluster at RAY_ADDRESS or of this machine, else one started here.

    Raises HearSsamError where Ray is not installed, no cluster answers, or it lacks the device.
    """
    if name != "ray":
        yield None
        return
    if device not in ("auto", "cpu", "cuda"):
        raise HearSsamError(f"--device {device}: with --engine ray the cluster chooses; take auto, cpu or cuda.")
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise HearSsamError("--engine ray: Ray is not installed; pip install 'hear-ssam[cluster]'.") from error
    if joined := not ray.is_initialized():
        handler, quiet = signal.getsignal(signal.SIGTERM), {"log_to_driver": False, "logging_level": "error"}
        host, _, port = (address := os.environ.get("RAY_ADDRESS", "")).rpartition(":")
        try:
            if port.isdecimal() and "/" not in host:
                socket.create_connection((host, int(port)), 10).close()  # Ray itself tries for ten minutes
            ray.init("auto", **quiet)
        except OSError as error:
            if address:
                raise HearSsamError(f"RAY_ADDRESS={address}: no Ray cluster answers; correct or unset it.") from error
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init("local", num_cpus=usable_cpus(), include_dashboard=False, **quiet)
        finally:
            with contextlib.suppress(ValueError, TypeError):  # in another thread; set by other code than Python
                signal.signal(signal.SIGTERM, handler)  # Ray puts its own there
    try:
        yield Cluster(ray, device, workers, folders)
    finally:
        if joined:
            ray.shutdown()
