"""The benchmarks: `python -m benchmarks NAME [OPTIONS]`, from a checkout (README.md says what each one writes)."""

from __future__ import annotations

import importlib
import sys

from hear_ssam.errors import HearSsamError

# Each is a module with main(arguments) -> exit code; it is imported only when it is asked for (gpu needs triton).
NAMES = {
    "cpu": "speed and error of the encoder against other implementations and the machine's limit",
    "gpu": "correctness and speed of the GPU kernels, the encoder and a training step",
    "probes": "the scores of both probes over many seeds",
    "collections": "hear-ssam embed on an hour-long file, on thousands of short ones, on recordings",
    "heareval": "heareval itself and our probes on the same embeddings: time, memory, score",
    "fsd50k": "time and memory of a task of FSD50K's size, in two parts",
    "onnx": "the file of `hear-ssam export` in onnxruntime, beside the model itself",
    "leaks": "recall and false alarms of the search for test recordings in a pre-training store",
    "scaling": "time, memory and operations of the four systems by length; attention naive and fused",
    "ablations": "equal trainings of SSAM that differ in one thing",
    "comparison": "scores with intervals, speed and memory of checkpoints that are named",
    "choices": "the picture of token order and mask position",
}


def main(arguments: list[str]) -> int:
    """Run one benchmark. Exit codes: 0 done; 1 something failed; 2 wrong input."""
    name, *options = arguments or ["--help"]
    if name not in NAMES:
        print(__doc__, *(f"  {name:<13}{job}" for name, job in NAMES.items()), sep="\n")
        print("\npython -m benchmarks NAME --help says more of one of them.")
        return 0 if name in ("-h", "--help") else 2
    try:
        return int(importlib.import_module(f"benchmarks.{name}").main(options))
    except (HearSsamError, ModuleNotFoundError) as error:
        print(f"benchmarks {name}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
