"""The test command: `python -m tests [--extended]`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PYTEST = (sys.executable, "-m", "pytest", "-rs")  # says what is skipped, and why

STEPS: dict[str, tuple[str | Path, ...]] = {
    "ruff": (sys.executable, "-m", "ruff", "check"),
    "ruff format": (sys.executable, "-m", "ruff", "format", "--check"),
    "mypy": (sys.executable, "-m", "mypy"),
    "import-linter": (BIN / "lint-imports",),
    "pytest": PYTEST,
    "the HEAR tools": (*PYTEST, "-m", "tools"),
}
EXTENDED: dict[str, tuple[str | Path, ...]] = {"slow tests": (*PYTEST, "-m", "slow")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests", description=__doc__)
    parser.add_argument("--extended", action="store_true", help="also the slow tests (minutes)")
    extended = parser.parse_args().extended
    # Small matrices on many threads spin more than they compute, the more so on a busy machine.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    results = []
    for name, command in {**STEPS, **(EXTENDED if extended else {})}.items():
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        results.append((name, "passed" if code == 0 else "FAILED", f"{time.perf_counter() - start:6.1f} s"))
    if not extended:
        results += [(name, "not run", "needs --extended") for name in EXTENDED]

    print("\n== summary")
    for name, result, seconds in results:
        print(f"{name:<16}{result:<10}{seconds}")
    return int(any(result == "FAILED" for _, result, _ in results))


if __name__ == "__main__":
    sys.exit(main())
