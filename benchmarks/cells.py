"""What the studies share: cells that run alone, a CSV with one row each, a section of README.md made from the CSV.

A study is a module with KEYS, the columns that name a cell; `measure(cell)`, which yields dicts of what it finds, each
as soon as it is known; and `page(rows, folder)`, which draws the figure and returns Markdown. A cell is a dict of plain
values; what has a name with a _ in front stands in no CSV. A cell that is in the CSV is not run again, unless it ended
at limits that are now higher.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import multiprocessing
import os
import random
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hear_ssam.errors import HearSsamError
from hear_ssam.paths import atomic_write, write_whole

from . import plain_parser
from .cpu import facts

HERE = Path(__file__).parent
Row = dict[str, str]
Cell = dict[str, Any]


# --- one cell, in a process of its own ------------------------------------------------------------------------------


def resident(peak: bool = False, reset: bool = False) -> float:
    """MB of memory that this process has resident now, or had at most since it was started or `reset`."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status)[1]) * 1024 / 1e6  # type: ignore[index]
    except OSError:  # no Linux: never less than the peak so far
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def timed(
    action: Callable[[Any], object],
    prepare: Callable[[], Any] = lambda: None,
    limit: float | None = None,
    runs: int = 5,
    enough: float = 3.0,
) -> dict[str, Any]:
    """CPU and wall seconds of `runs` calls of action(prepare()), fewer once they took `enough` seconds together.

    peak_mb: what the first call had resident above what the process held before. A call that takes more than `limit`
    seconds of CPU ends the process: `alone` turns that into a row.
    """
    held = resident(reset=True)
    given, cpu_s, wall_s, peak = prepare(), list[float](), list[float](), 0.0
    while len(cpu_s) < runs and sum(cpu_s) < enough:
        begin, began = time.process_time(), time.perf_counter()
        if limit:
            import resource

            resource.setrlimit(resource.RLIMIT_CPU, (int(begin + limit) + 1, resource.RLIM_INFINITY))
        action(given)
        cpu_s.append(time.process_time() - begin)
        wall_s.append(time.perf_counter() - began)
        peak = peak or resident(peak=True)
    return {"cpu_s": cpu_s, "wall_s": wall_s, "peak_mb": peak - held}


def medians(found: dict[str, Any]) -> Cell:
    """The columns that `timed` fills."""
    cpu_s, wall_s = (statistics.median(found[name]) for name in ("cpu_s", "wall_s"))
    return {"cpu_ms": f"{1e3 * cpu_s:.4g}", "wall_ms": f"{1e3 * wall_s:.4g}", "runs": len(found["cpu_s"]),
            "peak_mb": f"{found['peak_mb']:.0f}"}  # fmt: skip


def alone(study: str, cell: Cell) -> Cell:
    """What measure(cell) of the module `study` finds in a process of its own; "ended": why it found less, or ""."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # a study that wants more tells torch
    forked = "forkserver" in multiprocessing.get_all_start_methods()  # from one that has imported torch and no more
    context = multiprocessing.get_context("forkserver" if forked else "spawn")
    if forked:
        context.set_forkserver_preload(["hear_ssam.encoder"])
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, study, cell))
    process.start()
    theirs.close()
    found: Cell = {"ended": ""}
    with contextlib.suppress(EOFError):
        while True:
            found |= pipe.recv()
    process.join()
    if process.exitcode and process.exitcode == -getattr(signal, "SIGXCPU", 0):
        found["ended"] = f"over {cell['limit_s']:g} s"
    elif process.exitcode:
        raise HearSsamError(f"{cell}: its process ended with {process.exitcode}; see above, mend it and run again.")
    return found


def _serve(pipe: Connection, study: str, cell: Cell) -> None:
    """The body of such a process: send everything that is found."""
    if cell.get("limit_gb"):
        import resource

        size = int(cell["limit_gb"] * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    try:
        for found in importlib.import_module(study).measure(cell):
            pipe.send(found)
    except (RuntimeError, MemoryError) as error:  # torch has no name for it on a CPU
        if not isinstance(error, MemoryError) and not re.search("alloc|out of memory", str(error)):
            raise
        pipe.send({"ended": "out of memory"})


# --- all cells of a study -------------------------------------------------------------------------------------------


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """The options that all studies have."""
    made = plain_parser(name, text)
    made.add_argument("-o", "--output", type=Path, default=HERE, help=f"folder of {name}.csv, its figure and README.md")
    made.add_argument("--seed", type=int, default=0, help="of the order of the cells (default 0)")
    made.add_argument("--page", action="store_true", help="run nothing; make figure and page of the CSV again")
    return made


def run(
    study: str, cells: Sequence[Cell], args: argparse.Namespace, cost: Callable[[Cell], Any], **limits: float
) -> int:
    """Run what the CSV of the module `study` lacks, then write the page; 1 where a cell failed, which runs again.

    The order is random, then by `cost` where that differs: what is cheap is there early.
    """
    from tqdm import tqdm

    module, name = importlib.import_module(study), study.rpartition(".")[2]
    table, failed = args.output / f"{name}.csv", 0
    rows = read(table)

    def key(row: Row | Cell) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in module.KEYS)

    known = {key(row): row for row in rows}
    todo = [cell for cell in cells if not _done(known.get(key(cell)), limits)]
    random.Random(args.seed).shuffle(todo)
    todo = [] if args.page else sorted(todo, key=cost)
    for cell in tqdm(todo, unit="cell", desc=name, disable=not todo):
        try:
            found = alone(study, cell | limits)
        except HearSsamError as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        row = {**cell, **found, **limits, **facts(cell.get("threads", 1))}
        row = {column: str(value) for column, value in row.items() if not column.startswith("_")}
        rows = [old for old in read(table) if key(old) != key(cell)]  # without what ended at a lower limit
        write(table, rows := [*rows, row])
    publish(name, module.page(rows, args.output), args.output / "README.md")
    return 1 if failed else 0


def _done(row: Row | None, limits: dict[str, float]) -> bool:
    return row is not None and (not row["ended"] or all(float(row[name]) >= value for name, value in limits.items()))


def read(table: Path) -> list[Row]:
    if not table.exists():
        return []
    with open(table, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(table: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic_write(table) as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# --- the page -------------------------------------------------------------------------------------------------------


def publish(name: str, text: str, page: Path) -> None:
    """Put the section of a study between its marks in README.md."""
    begin, end = f"<!-- made by python -m benchmarks {name} -->\n", f"<!-- end of {name} -->"
    before = page.read_text("utf-8") if page.exists() else ""
    if begin not in before:
        before += f"\n{begin}{end}\n"
    head, tail = before.split(begin)[0], before.split(end)[1]
    write_whole(page, f"{head}{begin}{text.strip()}\n{end}{tail}")


def piped(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def canvas(columns: int, width: float, height: float) -> Any:
    """A figure of panels side by side, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.2, "axes.axisbelow": True})
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def save(figure: Any, file: Path) -> None:
    """As a PNG of 64 colours, a quarter of the size."""
    import matplotlib.pyplot as plt
    from PIL import Image

    figure.savefig(file, dpi=100)
    plt.close(figure)
    with Image.open(file) as image:
        image.convert("RGB").quantize(64).save(file, optimize=True)


def machines(rows: Sequence[Row]) -> str:
    """What the rows were measured on, in a sentence."""
    cpus = [row for row in rows if not row.get("GPU")]
    names = sorted({f"{row['CPU']} ({row['features']}), {row['threads']} thread, {row['versions']}" for row in cpus})
    names += sorted({f"{row['GPU']}, {row['versions']}" for row in rows if row.get("GPU")})
    return f"Measured on {'; '.join(names)}." if names else ""
