"""`hear-ssam benchmark`: how fast this package is on this machine, how exact, and how far from what the machine allows.

Every row of a table is a process of its own; the processes take turns, so that a disturbance hits all rows alike.
All Mamba rows have the same weights and the same input; a peer replaces the mixer inside our encoder. With one thread
the clock is the CPU time of the process, which other programs disturb little; with more it is the wall clock, as it is
for the start of a process.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .errors import HearSsamError, unknown_name
from .paths import atomic_write

PEERS = ("transformers", "mambapy", "selective_scan_ref")
SIZES = ("tiny", "small", "base")
MODES = ("inference", "training", "long", "start")
TURN = 0.2  # seconds that a fast row repeats in one turn
LONG, CHUNK = 22_001, 1_000  # tokens

EXAMPLES = """examples:
  hear-ssam benchmark --quick                       a minute: tiny only, few repeats
  hear-ssam benchmark -o benchmarks                 everything; writes one .csv and one .md per mode
  hear-ssam benchmark --modes training --peers mambapy

peers (kept out of your environment; a missing one gives a row that says so):
  pip install --target peers transformers
  pip install --target peers --no-deps mambapy
  PYTHONPATH=peers hear-ssam benchmark

modes:
  inference   one 2-second clip (251 tokens) through the encoder
  training    forward and backward of one clip, tiny
  long        22,001 tokens, tiny, whole and in chunks with carried state: time and peak memory
  start       a fresh process: import, first and second embedding, tiny
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "benchmark",
        help="speed and error against other implementations and the machine's limit",
        description="Measure the encoder on this machine: speed, error against float64, and the floor (matrix products "
        "at the best rate seen, plus the scan at the rate of the multiply units).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny only, 3 rounds instead of 7")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of every row (default 1)")
    parser.add_argument("--sizes", default=",".join(SIZES), help="of the inference rows (default %(default)s)")
    parser.add_argument("--modes", default=",".join(MODES), help="(default %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), help="(default %(default)s; '' for none)")
    parser.add_argument("-o", "--output", type=Path, help="folder for .csv and .md (default: print only)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    sizes, modes, peers = (
        _choices(kind, getattr(args, kind), known)
        for kind, known in (("sizes", SIZES), ("modes", MODES), ("peers", PEERS))
    )
    if args.threads < 1:
        raise HearSsamError(f"--threads must be at least 1, not {args.threads}.")
    rounds, sizes = (3, sizes[:1]) if args.quick else (7, sizes)
    for mode in modes:
        conditions = _conditions(args.threads)
        conditions["clock"] = "CPU time of the process" if args.threads == 1 and mode != "start" else "wall"
        rows: list[Row] = []
        if mode in ("inference", "training"):
            for size in sizes if mode == "inference" else ["tiny"]:
                more, rates = _take_turns(_tasks(mode, size, peers, args.threads), rounds)
                rows += more
                conditions[f"this machine, {size}"] = _describe(rates)
        else:
            rows = _one_by_one(_tasks(mode, "tiny", peers, args.threads))
        text = _markdown(mode, rows, conditions)
        print(text)
        if args.output:
            _write(args.output, rows, text, conditions)
    return 0


def _choices(kind: str, text: str, known: tuple[str, ...]) -> list[str]:
    chosen = [word for word in text.split(",") if word]
    for word in chosen:
        if word not in known:
            raise unknown_name(f"benchmark {kind}", word, known)
    return [word for word in known if word in chosen]


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What one process measures."""

    mode: str
    system: str  # ssam or ssast
    size: str
    implementation: str
    dtype: str  # fp32, bf16, or float64 for the reference itself
    threads: int


@dataclass
class Row:
    mode: str
    size: str
    implementation: str
    dtype: str
    ms: float | None = None  # median
    ms_min: float | None = None
    repeats: int | None = None
    times_ours: float | None = None  # ms over that of the row cpu, fp32
    error: float | None = None  # max |x - float64| / max |float64|; training: of the worst parameter's gradient
    gflop: float | None = None  # of the matrix products
    mb: float | None = None  # weights and activations, each moved once
    floor_ms: float | None = None
    over_floor: float | None = None
    peak_mb: float | None = None  # above the loaded process
    note: str = ""


def _tasks(mode: str, size: str, peers: list[str], threads: int) -> list[Task]:
    rows = [("ssam", "cpu", "fp32"), ("ssam", "torch", "fp32")]
    if mode in ("inference", "long"):
        rows.insert(1, ("ssam", "cpu", "bf16"))
    if mode == "long":
        rows += [("ssam", "cpu in chunks", "fp32"), ("ssam", "cpu in chunks", "bf16")]
    if mode == "inference":
        rows += [("ssam", "reference", "fp32"), *(("ssam", peer, "fp32") for peer in peers)]
        rows += [("ssast", "sdpa", "fp32"), ("ssast", "naive attention", "fp32")]
    if mode == "training":  # one step of the other peers takes half a minute
        rows += [("ssam", peer, "fp32") for peer in peers if peer == "mambapy"]
    return [Task(mode, system, size, name, dtype, threads) for system, name, dtype in rows]


def _take_turns(tasks: list[Task], rounds: int) -> tuple[list[Row], dict[str, float]]:
    """One process per task, all at once, in turns; their results compared with float64; and the machine's rates."""
    first = tasks[0]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker(task)) for task in tasks]
        machine = stack.enter_context(_Worker(Task("machine", "ssam", first.size, "", "", first.threads)))
        running = [worker for worker in [*workers, machine] if not worker.wait()]
        for _ in range(rounds):
            for worker in running:
                worker.results.append(worker.ask("turn"))
                print(".", end="", file=sys.stderr, flush=True)
        print(f" {first.mode} {first.size}", file=sys.stderr)
        exact = {}
        for system in sorted({task.system for task in tasks}):
            with _Worker(Task(first.mode, system, first.size, "float64", "float64", first.threads)) as worker:
                worker.wait()
                exact[system] = worker.ask("output")
        rates = {name: max(result[name] for result in machine.results) for name in machine.results[0]}
        return _compared([_row(worker, exact[worker.task.system], rates) for worker in workers]), rates


def _one_by_one(tasks: list[Task]) -> list[Row]:
    """Processes that must have the machine, or its memory, to themselves."""
    rows = []
    for task in tasks:
        with _Worker(task) as worker:
            if not worker.wait():
                worker.results.append(worker.ask("turn"))
            rows.append(_row(worker, None, {}))
    return _compared(rows)


def _compared(rows: list[Row]) -> list[Row]:
    for row in rows:
        if row.ms and rows[0].ms:
            row.times_ours = row.ms / rows[0].ms
    return rows


def _row(worker: _Worker, exact: Any, rates: dict[str, float]) -> Row:
    task = worker.task
    row = Row(task.mode, task.size, f"{task.system} {task.implementation}", task.dtype, note=worker.failed)
    if worker.failed:
        return row
    times = [1e3 * t for result in worker.results for t in result["seconds"]]
    row.ms, row.ms_min, row.repeats = statistics.median(times), min(times), len(times)
    row.peak_mb = worker.results[-1].get("peak_mb")
    row.note = worker.results[-1].get("note", "")
    if exact is not None:
        errors = [abs(x - y).max() / abs(y).max() for x, y in zip(worker.ask("output"), exact, strict=True)]
        row.error = float(max(errors))
    if task.system == "ssam" and task.mode in ("inference", "training"):
        work = _work(task.size)
        passes = 3 if task.mode == "training" else 1  # the backward pass multiplies twice as much
        row.gflop, row.mb = work["flop"] * passes / 1e9, work["bytes"] / 1e6 if passes == 1 else None
        if passes == 1 and "elements" in rates:
            gemm = rates["bf16" if task.dtype == "bf16" else "fp32"]
            row.floor_ms = 1e3 * (work["flop"] / gemm + work["elements"] / rates["elements"])
            row.over_floor = row.ms / row.floor_ms
    return row


def _work(size: str) -> dict[str, float]:
    """FLOP of all projections, elements of the scans (tokens x width x state), and bytes moved at least, per clip."""
    from .config import CONFIGS

    c = CONFIGS[f"ssam_{size}"]
    tokens, dim, inner, rank, state = 1 + c.num_patches, c.embed_dim, c.inner_dim, c.dt_rank, c.state_dim
    low = rank + 2 * state
    weights = 2 * inner * dim + inner * low + rank * inner + inner * dim  # in, x, dt and out projections
    moved = (2 * dim) + (dim + 2 * inner) + 2 * inner + (inner + low) + (rank + inner)  # norm ... step size
    moved += (4 * inner + 2 * state) + (inner + dim) + 3 * dim  # scan, out projection, residual
    return {
        "flop": 2.0 * tokens * (c.depth * weights + c.patch_dim * dim),
        "elements": float(c.depth * tokens * inner * state),
        "bytes": 4.0 * c.depth * (weights + inner * (state + c.conv_kernel + 3) + tokens * moved),
    }


# --- one process ----------------------------------------------------------------------------------------------------


class _Worker:
    """A process that measures one task on request."""

    def __init__(self, task: Task) -> None:
        self.task, self.results = task, list[dict[str, Any]]()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, task), daemon=True)
        self._process.start()
        theirs.close()
        self.failed = ""

    def wait(self) -> str:
        """Until the process is prepared; "" or why it cannot be."""
        self.failed = self._receive()
        return self.failed

    def ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise HearSsamError(f"the benchmark process of {self.task} ended unexpectedly (out of memory?).") from None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # the process reads the end of its work
        self._process.join()


def _serve(pipe: Connection, task: Task) -> None:
    """The body of a process: prepare, say "" or why not, then answer "turn" and "output"."""
    begin = time.perf_counter()
    try:
        answers = _prepare(task, begin)
    except (ImportError, HearSsamError) as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
        return
    pipe.send("")
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(answers[pipe.recv()]())


def _prepare(task: Task, begin: float) -> dict[str, Callable[[], Any]]:
    import torch

    torch.set_num_threads(task.threads)
    clock = time.process_time if task.threads == 1 else time.perf_counter
    if task.mode == "machine":
        return {"turn": functools.partial(_machine_rates, task.size, clock)}
    from .blocks import MambaState, naive_attention
    from .config import CONFIGS
    from .encoder import Encoder
    from .scan import use_backend

    imported = time.perf_counter() - begin
    torch.manual_seed(0)
    config = CONFIGS[f"{task.system}_{task.size}"]
    encoder = Encoder(config).eval()
    spec = torch.randn(1, config.window_frames, config.n_mels)
    mask = torch.rand(1, config.num_patches) < 0.5
    name = task.implementation.split()[0]
    backend = name if task.system == "ssam" and name not in PEERS else "auto"
    if task.dtype == "float64":  # the law; for gradients its twin, whose own test is exact to 1e-10
        encoder, spec, backend = encoder.double(), spec.double(), "reference" if task.mode == "inference" else "torch"
    elif task.dtype == "bf16":
        encoder.set_precision("bf16")
    for block in encoder.blocks:
        if name in PEERS:
            block.mixer = _peer(name, block.mixer)
        elif name == "naive":
            block.attn.attention = naive_attention  # type: ignore[union-attr]

    def act() -> Any:
        with use_backend(backend):
            if task.mode == "training":
                encoder.zero_grad()
                encoder(spec, mask).loss.backward()
                return [weight.grad for weight in encoder.parameters() if weight.grad is not None]
            with torch.no_grad():
                return [encoder.tokens(spec)]

    def read_long() -> None:
        states = [MambaState() for _ in encoder.blocks]
        size = CHUNK if "chunks" in task.implementation else LONG
        with use_backend(backend), torch.no_grad():
            for chunk in torch.randn(1, LONG, config.embed_dim).split(size, dim=1):
                encoder.run_blocks(chunk, states)

    def start() -> dict[str, Any]:
        first, second = (_repeat(act, 0)[0] for _ in range(2))
        note = f"import {imported:.2f} s, first embedding {1e3 * first:.0f} ms, second {1e3 * second:.0f} ms"
        return {"seconds": [imported + first], "note": note}

    def turn() -> dict[str, Any]:
        if task.mode == "start":
            return start()
        if task.mode == "long":
            return _with_peak(read_long, clock)
        return {"seconds": _repeat(act, TURN, clock)}

    if task.mode != "start" and task.dtype != "float64":
        act()  # what loads or compiles at first use
    return {"turn": turn, "output": lambda: [x.detach().double().numpy() for x in act()]}


def _repeat(
    action: Callable[[], Any], at_least: float, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds of each of the runs that together take `at_least` seconds; one run at the least."""
    seconds: list[float] = []
    while not seconds or sum(seconds) < at_least:
        begin = clock()
        action()
        seconds.append(clock() - begin)
    return seconds


def _with_peak(action: Callable[[], Any], clock: Callable[[], float]) -> dict[str, Any]:
    """Time, and the highest memory while running above the memory held before."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on a Mac, in KiB elsewhere
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if os.path.exists("/proc/self/statm"):
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    seconds = _repeat(action, 0, clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"seconds": seconds, "peak_mb": (peak - before) / 1e6}


def _peer(name: str, mixer: Any) -> Any:
    """A module that computes what our Mamba `mixer` computes, with the same weights, as another package does it."""
    import torch

    (inner, state), kernel = mixer.A_log.shape, mixer.conv.weight.shape[1]
    dim, rank = mixer.out_proj.weight.shape[0], mixer.dt_proj.weight.shape[1]
    peer: torch.nn.Module
    if name == "transformers":
        transformers = importlib.import_module("transformers")
        config = transformers.MambaConfig(
            hidden_size=dim, intermediate_size=inner, expand=inner // dim, state_size=state, conv_kernel=kernel,
            time_step_rank=rank, num_hidden_layers=1,
        )  # fmt: skip
        peer = importlib.import_module("transformers.models.mamba.modeling_mamba").MambaMixer(config, 0)
    elif name == "mambapy":
        mambapy = importlib.import_module("mambapy.mamba")
        peer = mambapy.MambaBlock(
            mambapy.MambaConfig(
                d_model=dim, n_layers=1, dt_rank=rank, d_state=state, expand_factor=inner // dim, d_conv=kernel
            )
        )
    else:
        peer = _reference_mixer(dim, inner, rank, state, kernel)
    weights = {re.sub(r"^conv\.", "conv1d.", key): value for key, value in mixer.state_dict().items()}
    weights["conv1d.weight"] = weights["conv1d.weight"][:, None]
    peer.load_state_dict(weights)

    class Mixer(torch.nn.Module):  # with our signature
        def __init__(self) -> None:
            super().__init__()
            self.peer = peer

        def forward(self, x: Any, reverse: bool = False, state: Any = None) -> Any:
            return self.peer(x)

    return Mixer()


def _reference_mixer(dim: int, inner: int, rank: int, state: int, kernel: int) -> Any:
    """The formula of mamba-ssm's `selective_scan_ref` and its slow path, as literally as torch says it: channel first,
    everything of size channels x length x state in memory, one step at a time."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class ReferenceMixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
            self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
            self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
            self.dt_proj = nn.Linear(rank, inner)
            self.A_log = nn.Parameter(torch.zeros(inner, state))
            self.D = nn.Parameter(torch.ones(inner))
            self.out_proj = nn.Linear(inner, dim, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            length = tokens.shape[1]
            u, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)  # (B, D, L)
            u = F.silu(self.conv1d(u)[..., :length])
            low, B, C = self.x_proj(u.transpose(1, 2)).split((rank, state, state), dim=-1)
            delta = F.softplus(self.dt_proj(low)).transpose(1, 2)
            A = -torch.exp(self.A_log)
            decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
            inputs = torch.einsum("bdl,bln,bdl->bdln", delta, B, u)
            h = u.new_zeros(len(u), inner, state)
            outputs = []
            for t in range(length):
                h = decay[:, :, t] * h + inputs[:, :, t]
                outputs.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
            y = torch.stack(outputs, dim=2) + u * self.D[:, None]
            return self.out_proj((y * F.silu(z)).transpose(1, 2))

    return ReferenceMixer()


# --- the machine ----------------------------------------------------------------------------------------------------

# Instructions for the multiply units per register of states: step size x A, five fused ones for the polynomial of 2^r,
# two for its exponent, and decay x state + input x B, y + state x C. Other units can run everything else beside them.
MULTIPLIES = 11


@functools.cache
def _multiply_kernels() -> Any:
    from .simd import Kernel, build

    def write(k: Kernel, chains: int) -> None:
        steps, out = k.integer("steps"), k.tensor("out", 1)
        values = [k.variable(k.constant(1.0 + i)) for i in range(chains)]
        with k.loop(0, steps):
            for value in values * (16 // chains):
                value.value = value.value * 0.75 + 1.0
        for i, value in enumerate(values):
            out.store(value.value, i * 16)

    return build(write, 1), build(write, 16)


def _machine_rates(size: str, clock: Callable[[], float]) -> dict[str, float]:
    """FLOP/s of matrix products of this size's shapes (fp32, bf16), scan elements/s of the multiply units, clock."""
    import torch
    import torch.nn.functional as F

    from .config import CONFIGS

    c = CONFIGS[f"ssam_{size}"]
    rates: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for of, to in ((c.embed_dim, 2 * c.inner_dim), (c.inner_dim, c.embed_dim)):
            x, weight = torch.randn(1 + c.num_patches, of, dtype=dtype), torch.randn(to, of, dtype=dtype)
            fastest = min(_repeat(functools.partial(F.linear, x, weight), TURN / 4, clock))
            rates[name] = max(rates.get(name, 0.0), 2.0 * len(x) * of * to / fastest)
    with contextlib.suppress(ImportError):  # no llvmlite, no clock
        from .simd import LANES, run

        out, steps = torch.zeros(256), 2000
        seconds = [
            min(_repeat(functools.partial(run, kernel, 1, steps=steps, out=out), TURN / 8, clock)) / (16 * steps)
            for kernel in _multiply_kernels()
        ]
        rates["clock"] = 4 / seconds[0]  # a chain of fused multiply-adds advances every 4 cycles
        rates["multiply_cycles"] = seconds[1] * rates["clock"]
        rates["elements"] = LANES / (MULTIPLIES * seconds[1])
    return rates


def _conditions(threads: int) -> dict[str, str]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    facts = dict(re.split(r"\s*: ", line, maxsplit=1) for line in lines if ": " in line)
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve", "bf16")
    flags = facts.get("flags", facts.get("Features", "")).split()
    versions = {}
    for name in ("hear-ssam", "torch", "llvmlite", "numpy", "transformers", "mambapy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "date": date.today().isoformat(),
        "CPU": facts.get("model name", platform.processor() or platform.machine()),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "features": " ".join(flag for flag in wanted if flag in flags),
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "load": " ".join(f"{x:.1f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


# --- tables ---------------------------------------------------------------------------------------------------------

FORMATS = {"ms": ".1f", "ms_min": ".1f", "times_ours": ".2f", "error": ".0e", "gflop": ".2f", "mb": ".0f",
           "floor_ms": ".1f", "over_floor": ".2f", "peak_mb": ".0f"}  # fmt: skip


def _describe(rates: dict[str, float]) -> str:
    text = f"matrix products {rates['fp32'] / 1e9:.0f} GFLOP/s fp32, {rates['bf16'] / 1e9:.0f} bf16"
    if "clock" in rates:
        text += (
            f"; clock {rates['clock'] / 1e9:.2f} GHz, {rates['multiply_cycles']:.2f} cycles per multiply-add, so "
            f"{16 * rates['clock'] / rates['elements']:.1f} cycles per 16 scan elements ({MULTIPLIES} multiplications)"
        )
    return text


def _write(folder: Path, rows: list[Row], text: str, conditions: dict[str, str]) -> None:
    import torch

    device = re.sub(r"[^a-z0-9]+", "-", conditions["CPU"].lower()).strip("-")
    dtypes = "-".join(sorted({row.dtype for row in rows}, reverse=True))
    name = f"{rows[0].mode}_{dtypes}_{device}_{conditions['threads']}-threads_torch-{torch.__version__}"
    with atomic_write(folder / f"{name}.md") as path:
        path.write_text(text, encoding="utf-8")
    with atomic_write(folder / f"{name}.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Row)), *conditions])
        writer.writeheader()
        writer.writerows({**asdict(row), **conditions} for row in rows)
    print(folder / f"{name}.md")


def _markdown(mode: str, rows: list[Row], conditions: dict[str, str]) -> str:
    columns = [f.name for f in fields(Row) if f.name != "mode" and any(getattr(row, f.name) for row in rows)]
    lines = [f"# hear-ssam benchmark: {mode}", "", *(f"- {name}: {value}" for name, value in conditions.items()), ""]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        values = asdict(row)
        cells = ["" if values[c] is None else format(values[c], FORMATS.get(c, "")) for c in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
