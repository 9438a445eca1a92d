"""How fast the encoder is on this CPU, how exact, and how far from what the machine allows.

Every row of a table is a process of its own; the processes take turns, so that a disturbance hits all rows alike.
All Mamba rows have the same weights and the same input; a peer replaces the mixer inside our encoder. With one thread
the clock is the CPU time of the process, which other programs disturb little; with more it is the wall clock, as it is
for the start of a process.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from hear_ssam.errors import HearSsamError, unknown_name
from hear_ssam.machine import FEATURES, cpu
from hear_ssam.paths import atomic_write, write_whole

from . import plain_parser
from .cpu_process import PARTS, PEERS, REST, SCAN, WHOLE, Measurement, Worker

SIZES = ("tiny", "small", "base")
MODES = ("inference", "parts", "training", "long", "start")

EXAMPLES = """examples:
  python -m benchmarks cpu --quick                  a minute: tiny only, few repeats
  python -m benchmarks cpu -o benchmarks            everything; writes one .csv and one .md per mode
  python -m benchmarks cpu --modes training --peers mambapy

peers (kept out of your environment; a missing one gives a row that says so):
  pip install --target peers transformers
  pip install --target peers --no-deps mambapy
  PYTHONPATH=peers python -m benchmarks cpu

modes:
  inference   one 2-second clip (251 tokens) through the encoder
  parts       where the time of our own row of `inference` goes, each part beside its floor
  training    forward and backward of one clip, tiny
  long        22,001 tokens, tiny, whole and in chunks with carried state: time and peak memory
  start       a fresh process: import, first and second embedding, tiny
"""


def main(arguments: list[str]) -> int:
    """`python -m benchmarks cpu`: print the table of each mode, write it where -o says."""
    text = "Measure the encoder on this machine: speed, error against float64, and the floor (matrix products at the "
    text += "best rate seen, plus the scan at the rate of the multiply units)."
    parser = plain_parser("cpu", text, epilog=EXAMPLES)
    parser.add_argument("--quick", action="store_true", help="tiny only, 3 rounds instead of 7")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of every row (default 1)")
    parser.add_argument("--sizes", default=",".join(SIZES), help="of the inference rows (default %(default)s)")
    parser.add_argument("--modes", default=",".join(MODES), help="(default %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), help="(default %(default)s; '' for none)")
    parser.add_argument("-o", "--output", type=Path, help="folder for .csv and .md (default: print only)")
    args = parser.parse_args(arguments)
    sizes, modes, peers = (
        _choices(kind, getattr(args, kind), known)
        for kind, known in (("sizes", SIZES), ("modes", MODES), ("peers", PEERS))
    )
    if args.threads < 1:
        raise HearSsamError(f"--threads must be at least 1, not {args.threads}.")
    rounds, sizes = (3, sizes[:1]) if args.quick else (7, sizes)
    for mode in modes:
        conditions = facts(args.threads)
        conditions["made by"] = _command(args, mode)
        conditions["clock"] = "CPU time of the process" if args.threads == 1 and mode != "start" else "wall"
        rows: list[Row] = []
        if mode in ("inference", "parts", "training"):
            for size in ["tiny"] if mode == "training" else sizes:
                tasks = _tasks(mode, size, peers, args.threads)
                more, rates = (_parts if mode == "parts" else _take_turns)(tasks, rounds)
                rows += more
                conditions[f"this machine, {size}"] = _describe(rates)
        else:
            rows = _one_by_one(_tasks(mode, "tiny", peers, args.threads))
        text = _markdown(mode, rows, conditions)
        print(text)
        if args.output:
            _write(args.output, rows, text, conditions)
    return 0


def _command(args: argparse.Namespace, mode: str) -> str:
    """What makes the table of one mode again."""
    words = ["python -m benchmarks cpu", *(["--quick"] if args.quick else []), f"--modes {mode}"]
    words += [f"--{name} {shlex.quote(str(getattr(args, name)))}" for name in ("threads", "sizes", "peers")]
    return f"`{' '.join(words)} -o benchmarks`"


def _choices(kind: str, text: str, known: tuple[str, ...]) -> list[str]:
    chosen = [word for word in text.split(",") if word]
    for word in chosen:
        if word not in known:
            raise unknown_name(f"benchmark {kind}", word, known)
    return [word for word in known if word in chosen]


# --- rows -----------------------------------------------------------------------------------------------------------


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


def _tasks(mode: str, size: str, peers: list[str], threads: int) -> list[Measurement]:
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
    return [Measurement(mode, system, size, name, dtype, threads) for system, name, dtype in rows]


def _take_turns(tasks: list[Measurement], rounds: int) -> tuple[list[Row], dict[str, float]]:
    """One process per task, all at once, in turns; their results compared with float64; and the machine's rates."""
    first = tasks[0]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(task)) for task in tasks]
        machine = stack.enter_context(Worker(Measurement("machine", "ssam", first.size, "", "", first.threads)))
        running = [worker for worker in [*workers, machine] if not worker.wait()]
        for _ in range(rounds):
            for worker in running:
                worker.results.append(worker.ask("turn"))
                print(".", end="", file=sys.stderr, flush=True)
        print(f" {first.mode} {first.size}", file=sys.stderr)
        exact = {}
        for system in sorted({task.system for task in tasks}):
            with Worker(Measurement(first.mode, system, first.size, "float64", "float64", first.threads)) as worker:
                worker.wait()
                exact[system] = worker.ask("output")
        rates = _rates(machine)
        return _compared([_row(worker, exact[worker.task.system], rates) for worker in workers]), rates


def _parts(tasks: list[Measurement], rounds: int) -> tuple[list[Row], dict[str, float]]:
    """A row for each part of the blocks of the first task, the rest, and the whole: medians of the same passes."""
    task = tasks[0]
    with Worker(task) as ours, Worker(Measurement("machine", "ssam", task.size, "", "", task.threads)) as machine:
        for worker in (ours, machine):
            if worker.wait():
                raise HearSsamError(f"benchmarks cpu --modes parts: {worker.failed}")
        for _ in range(rounds):
            for worker in (ours, machine):
                worker.results.append(worker.ask("turn"))
    rates = _rates(machine)
    work = {part: 1e3 * flop / rates["fp32"] for part, flop in _products(task.size).items()}
    if "elements" in rates:
        work[SCAN] += 1e3 * _work(task.size)["elements"] / rates["elements"]
    rows = []
    for part in ours.results[0]:
        times = [1e3 * seconds for result in ours.results for seconds in result[part]]
        row = Row(task.mode, task.size, part, task.dtype, statistics.median(times), min(times), len(times))
        row.floor_ms = sum(work.values()) if part == WHOLE else work.get(part)
        row.over_floor = row.ms / row.floor_ms if row.ms and row.floor_ms else None
        rows.append(row)
    return rows, rates


def _rates(machine: Worker) -> dict[str, float]:
    """The best that was seen of each."""
    return {name: max(result[name] for result in machine.results) for name in machine.results[0]}


def _one_by_one(tasks: list[Measurement]) -> list[Row]:
    """Processes that must have the machine, or its memory, to themselves."""
    rows = []
    for task in tasks:
        with Worker(task) as worker:
            if not worker.wait():
                worker.results.append(worker.ask("turn"))
            rows.append(_row(worker, None, {}))
    return _compared(rows)


def _compared(rows: list[Row]) -> list[Row]:
    for row in rows:
        if row.ms and rows[0].ms:
            row.times_ours = row.ms / rows[0].ms
    return rows


def _row(worker: Worker, exact: Any, rates: dict[str, float]) -> Row:
    task = worker.task
    row = Row(task.mode, task.size, f"{task.system} {task.implementation}", task.dtype, note=worker.failed)
    if worker.failed:
        return row
    times = [1e3 * t for result in worker.results for t in result["seconds"]]
    row.ms, row.ms_min, row.repeats = statistics.median(times), min(times), len(times)
    row.peak_mb = worker.results[-1].get("peak_mb")
    row.note = worker.results[-1].get("note", "")
    if exact is not None:
        output = worker.ask("output")
        row.error = float(max(abs(output[name] - value).max() / abs(value).max() for name, value in exact.items()))
    if task.system == "ssam" and task.mode in ("inference", "training"):
        work = _work(task.size)
        passes = 3 if task.mode == "training" else 1  # the backward pass multiplies twice as much
        row.gflop, row.mb = work["flop"] * passes / 1e9, work["bytes"] / 1e6 if passes == 1 else None
        if passes == 1 and "elements" in rates:
            gemm = rates["bf16" if task.dtype == "bf16" else "fp32"]
            row.floor_ms = 1e3 * (work["flop"] / gemm + work["elements"] / rates["elements"])
            row.over_floor = row.ms / row.floor_ms
    return row


def _weights(c: Any) -> dict[str, int]:
    """How many weights the matrix products of each part of a block have, of an encoder's config."""
    dim, inner, rank, low = c.embed_dim, c.inner_dim, c.dt_rank, c.dt_rank + 2 * c.state_dim
    return dict(zip(PARTS, (0, 2 * inner * dim, 0, inner * low, rank * inner, inner * dim), strict=True))


def _products(size: str) -> dict[str, float]:
    """FLOP of the matrix products of each part, per clip."""
    from hear_ssam.config import CONFIGS

    c = CONFIGS[f"ssam_{size}"]
    flop = {part: 2.0 * (1 + c.num_patches) * c.depth * count for part, count in _weights(c).items()}
    return flop | {REST: 2.0 * (1 + c.num_patches) * c.patch_dim * c.embed_dim}


def _work(size: str) -> dict[str, float]:
    """FLOP of all projections, elements of the scans (tokens x width x state), and bytes moved at least, per clip."""
    from hear_ssam.config import CONFIGS

    c = CONFIGS[f"ssam_{size}"]
    tokens, dim, inner, rank, state = 1 + c.num_patches, c.embed_dim, c.inner_dim, c.dt_rank, c.state_dim
    low = rank + 2 * state
    weights = sum(_weights(c).values())
    moved = (2 * dim) + (dim + 2 * inner) + 2 * inner + (inner + low) + (rank + inner)  # norm ... step size
    moved += (4 * inner + 2 * state) + (inner + dim) + 3 * dim  # scan, out projection, residual
    return {
        "flop": sum(_products(size).values()),
        "elements": float(c.depth * tokens * inner * state),
        "bytes": 4.0 * c.depth * (weights + inner * (state + c.conv_kernel + 3) + tokens * moved),
    }


def facts(threads: int, *others: str) -> dict[str, str]:
    """What a table was made on: date, machine, its load, versions (of `others`, too)."""
    import torch

    name, flags = cpu()
    versions = {}
    for package in ("hear-ssam", "torch", "llvmlite", "numpy", "transformers", "mambapy", *others):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "date": date.today().isoformat(),
        "CPU": name,
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "features": " ".join(flag for flag in FEATURES if flag in flags),
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "load": " ".join(f"{x:.1f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
        "versions": ", ".join(f"{package} {version}" for package, version in versions.items()),
    }


def heading(title: str, conditions: dict[str, str]) -> str:
    """What stands above a table, in Markdown."""
    return "\n".join([f"# {title}", "", *(f"- {name}: {value}" for name, value in conditions.items()), ""])


# --- tables ---------------------------------------------------------------------------------------------------------

FORMATS = {"ms": ".1f", "ms_min": ".1f", "times_ours": ".2f", "error": ".0e", "gflop": ".2f", "mb": ".0f",
           "floor_ms": ".1f", "over_floor": ".2f", "peak_mb": ".0f"}  # fmt: skip


def _describe(rates: dict[str, float]) -> str:
    text = f"matrix products {rates['fp32'] / 1e9:.0f} GFLOP/s fp32, {rates['bf16'] / 1e9:.0f} bf16"
    if "clock" in rates:
        cycles = 16 * rates["clock"] / rates["elements"]
        text += f"; clock {rates['clock'] / 1e9:.2f} GHz; {cycles:.1f} cycles per 16 scan elements"
        text += f" ({rates['multiplies']:.0f} instructions of the multiply units per register of states)"
    return text


def _write(folder: Path, rows: list[Row], text: str, conditions: dict[str, str]) -> None:
    import torch

    device = re.sub(r"[^a-z0-9]+", "-", conditions["CPU"].lower()).strip("-")
    dtypes = "-".join(sorted({row.dtype for row in rows}, reverse=True))
    name = f"{rows[0].mode}_{dtypes}_{device}_{conditions['threads']}-threads_torch-{torch.__version__}"
    write_whole(folder / f"{name}.md", text)
    with atomic_write(folder / f"{name}.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Row)), *conditions])
        writer.writeheader()
        writer.writerows({**asdict(row), **conditions} for row in rows)
    print(folder / f"{name}.md")


def _markdown(mode: str, rows: list[Row], conditions: dict[str, str]) -> str:
    columns = [f.name for f in fields(Row) if f.name != "mode" and any(getattr(row, f.name) for row in rows)]
    lines = [heading(f"CPU benchmark: {mode}", conditions), f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        values = asdict(row)
        cells = ["" if values[c] is None else format(values[c], FORMATS.get(c, "")) for c in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
