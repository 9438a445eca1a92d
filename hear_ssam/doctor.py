"""`hear-ssam doctor`: what this machine offers, and why something does not run."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from typing import Any

from . import __version__
from .machine import FEATURES, cpu

NEEDED = ("numpy", "scipy", "scikit-learn", "soundfile", "soxr", "safetensors", "pyarrow")
OPTIONAL = ("llvmlite", "triton", "mamba-ssm", "causal-conv1d", "torchaudio")

EXAMPLES = """examples:
  hear-ssam doctor
  hear-ssam doctor --json | jq .scan_backends
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="versions, devices, CPU features, scan backends, weights",
        description="Report versions, devices, CPU features, which scan backends run (or why not), weights, tools.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for section, entries in report.items():
        print(section.replace("_", " "))
        width = max(map(len, entries), default=0)
        for name, value in entries.items():
            print(f"  {name:<{width}}  {value}")
    return 0


def examine() -> dict[str, dict[str, Any]]:
    """The report: section → name → finding, ready for JSON."""
    import soundfile
    import torch

    from .download import cache_folder
    from .paths import sha256, shipped
    from .scan import available_backends

    python = f"{platform.python_version()} on {platform.platform()}"
    versions = {"hear-ssam": __version__, "python": python, "torch": torch.__version__}  # with its build, cpu or CUDA
    versions |= {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    backends = {name: reason or "runs" for name, reason in available_backends().items()}
    backends["HEAR_SSAM_BACKEND"] = os.environ.get("HEAR_SSAM_BACKEND", "not set")
    name, flags = cpu()
    features = " ".join(flag for flag in FEATURES if flag in flags) or "unknown"
    by_torch = {"torch uses": torch.backends.cpu.get_cpu_capability(), "torch threads": torch.get_num_threads()}
    files = sorted(file for folder in (shipped("checkpoints"), cache_folder()) for file in folder.glob("*.safetensors"))
    return {
        "versions": versions | {"libsndfile": str(soundfile.__libsndfile_version__)},
        "cpu": {"name": name, "cores": os.cpu_count(), "features": features, **by_torch},
        "devices": _devices(),
        "scan_backends": backends,
        "weights": {str(file): f"{file.stat().st_size / 1e6:.1f} MB, sha256 {sha256(file)}" for file in files},
        "hear_tools": _hear_tools(),
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    import torch

    devices = {"cpu": "runs"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    if not torch.cuda.is_available():
        devices["cuda"] = "no GPU found" if torch.version.cuda else "this torch is built without CUDA"
    return devices


def _hear_tools() -> dict[str, str]:
    from .heareval import INSTALL

    versions = {name: _version(name) for name in ("hearvalidator", "heareval")}
    if "not installed" in versions.values():
        versions["to install them"] = "\n    ".join(["", *INSTALL])
    return versions
