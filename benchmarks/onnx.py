"""The file of `hear-ssam export` in onnxruntime, beside the model itself: one clip of 2 s, one thread.

python -m benchmarks onnx
python -m benchmarks onnx --model ssam_base --random
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hear_ssam import load_model
from hear_ssam.embedding.export import export_onnx
from hear_ssam.machine import cpu


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks onnx", description=(__doc__ or "").split("\n")[0])
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
    versions = f"torch {torch.__version__}, onnxruntime {runtime.__version__}, Python {platform.python_version()}"
    print(f"{cpu()[0]}, one thread; {versions}")
    print(f"\n| {args.model}, one clip of 2 s | ms | largest difference |\n|---|---|---|")
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
