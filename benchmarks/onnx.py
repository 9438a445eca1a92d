"""The file of `hear-ssam export` in onnxruntime, beside the model itself: one clip of 2 s, one thread, its CPU time.

python -m benchmarks onnx > benchmarks/onnx.md
python -m benchmarks onnx --model ssam_base --random
"""

from __future__ import annotations

import importlib
import logging
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from hear_ssam import load_model
from hear_ssam.embedding.export import export_onnx

from . import plain_parser
from .cells import timed
from .cpu import facts, heading


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs after one that does not count; of CPU time, which other processes hardly touch."""
    function()
    return 1000 * statistics.median(timed(lambda _: function(), runs=repeats, enough=math.inf)["cpu_s"])


def main(arguments: list[str]) -> int:
    parser = plain_parser("onnx", __doc__)
    parser.add_argument("--model", default="ssam_tiny", help="default: ssam_tiny")
    parser.add_argument("--random", action="store_true", help="random weights")
    parser.add_argument("--repeats", type=int, default=20, help="default: 20")
    args = parser.parse_args(arguments)
    runtime = importlib.import_module("onnxruntime")
    torch.set_num_threads(1)
    model = load_model(model=args.model, pretrained=not args.random)
    audio = torch.rand(1, 32_000, generator=torch.Generator().manual_seed(0)) - 0.5
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # or it names what it could export of torchvision
    conditions = facts(1, "onnx", "onnxruntime") | {"clock": "CPU time of the process"}
    print(heading(f"{args.model} in onnxruntime", conditions))
    print("| one clip of 2 s | ms | largest difference |\n|---|---|---|")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        wanted = model.scene_and_rows(audio)
        print(f"| hear_ssam | {milliseconds(lambda: model.scene_and_rows(audio), args.repeats):.0f} | – |")
        for spectrogram in (False, True):
            file = export_onnx(model, Path(folder, "model.onnx"), spectrogram=spectrogram)
            session = runtime.InferenceSession(file, options)
            given = model.spectrogram(audio) if spectrogram else audio
            feed = {session.get_inputs()[0].name: given.numpy()}
            pairs = zip(session.run(None, feed), wanted, strict=True)
            apart = max(float((torch.from_numpy(theirs) - ours).abs().max()) for theirs, ours in pairs)
            taken = milliseconds(lambda session=session, feed=feed: session.run(None, feed), args.repeats)
            print(f"| onnxruntime, from {'spectrogram' if spectrogram else 'audio'} | {taken:.0f} | {apart:.0e} |")
    return 0
