"""What the CPU calls itself and which instructions it has."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

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
