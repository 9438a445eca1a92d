"""Options that several commands share: one way to name a model, one rule for the device."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .errors import HearSsamError, unknown_name

if TYPE_CHECKING:
    import torch

BASELINE = "logmel"  # the model without weights that counts as zero in tables
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of a logistic regression, the inverse strength of its L2 penalty
DEVICES = ("auto", "cpu", "cuda", "mps")


def add_model(parser: argparse.ArgumentParser, text: str = "default: the shipped ssam_tiny") -> None:
    """The option --model: what `load_model` of hear_ssam takes first."""
    parser.add_argument("--model", default="", metavar="NAME|FILE|FOLDER|REPO", help=text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options --model-options and --device; `parse_options` reads the first."""
    text = "further arguments of load_model, a JSON object"
    parser.add_argument("--model-options", default="{}", metavar="JSON", help=text)
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option --device, which `pick_device` understands."""
    text = "auto (default: the GPU where there is one), cpu, cuda, cuda:1, mps"
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=text)


def add_scale(parser: argparse.ArgumentParser, what: str) -> None:
    """The options --shard, which `parse_shard` reads, and --engine, for `machine.engine_named`."""
    text = f"every N-th {what} from the I-th (from 1): N jobs that write to one folder"
    parser.add_argument("--shard", metavar="I/N", help=text)
    text = "ray: on the Ray cluster at RAY_ADDRESS or of this machine, --workers per node or all GPUs; every node must "
    text += "see the files by the same names (default: local)"
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help=text)


def parse_shard(text: str | None) -> tuple[int, int]:
    """Which of how many equal parts: "3/8" → (3, 8); without a text all of one."""
    first, _, last = (text or "1/1").partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise HearSsamError(f"--shard {text}: give which part of how many, from 1/8 to 8/8.")
    return int(first), int(last)


def parse_options(text: str) -> dict[str, Any]:
    """Options of `load_model` from a JSON object."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise HearSsamError(f"model options must be a JSON object, not {text!r}: {error}.") from error
    if not isinstance(options, dict):
        raise HearSsamError(f"model options must be a JSON object, not {text!r}.")
    if "model_file_path" in options:
        raise HearSsamError(f"model options: name {options['model_file_path']!r} by --model, not as model_file_path.")
    return options


def pick_device(name: str | torch.device) -> torch.device:
    """The torch device of that name; raises HearSsamError for one that is not there.

    auto is a CUDA (or ROCm) GPU where torch finds one, else the CPU. Apple's GPU must be asked for, by `mps`: nobody
    has compared its numbers yet.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown_name("device", name, DEVICES) from error
    index, reason = device.index or 0, ""
    if device.type not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    if device.type == "cuda" and index >= torch.cuda.device_count():
        found = f"torch finds {torch.cuda.device_count()} GPUs here"
        reason = found if torch.version.cuda or torch.version.hip else "this torch is built without CUDA"
    if device.type == "mps" and not torch.backends.mps.is_available():
        reason = "no GPU of Apple's, or a torch built without it"
    if reason:
        raise HearSsamError(f"device {str(name)!r} cannot be used: {reason}; take another one, or auto.")
    return device
