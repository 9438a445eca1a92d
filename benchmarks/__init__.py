"""Benchmarks and studies of a checkout; `python -m benchmarks` lists them."""

from __future__ import annotations

import argparse
from typing import Any


def plain_parser(name: str, text: str | None, **more: Any) -> argparse.ArgumentParser:
    """The parser of a benchmark's options; the lines of its texts stay as they are."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=text, formatter_class=raw, **more)
