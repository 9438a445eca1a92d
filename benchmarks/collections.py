"""`hear-ssam embed` on an hour-long file, on thousands of short ones, on recordings: time, peak memory, equality.

    python -m benchmarks collections long --whole > benchmarks/collections-long.md   # an hour of 48 kHz stereo
    python -m benchmarks collections short > benchmarks/collections-short.md     # beside an AST of transformers
    python -m benchmarks collections real > benchmarks/collections-real.md       # an hour, and 1,000 clips, of the demo

Every measurement is a process of its own; the audio is written into a temporary folder first: noise, or for `real` the
demo's clips as stereo FLAC of 44.1 kHz, which have to be decoded, mixed down and resampled.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from hear_ssam.audio import find_audio
from hear_ssam.paths import shipped

from . import plain_parser
from .cpu import facts, heading

EMBED = "from hear_ssam import cli; code = cli.main(['embed', *sys.argv[1:]]); assert code == 0"
WHOLE = """import numpy, torch, hear_ssam; from hear_ssam.audio import read_audio
audio = torch.from_numpy(read_audio(sys.argv[1], 16000))[None]
model = hear_ssam.load_model(sys.argv[3])
scene, rows = (x.numpy() for x in torch.no_grad()(model.scene_and_rows)(audio))
numpy.savez(sys.argv[2], scene=scene[0], rows=rows[0])"""
# About as many parameters as ssam_tiny, patches and input as published, one window after the other as its users do it.
TRANSFORMERS = """import numpy, soundfile, soxr, torch; from pathlib import Path
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel
extract, (folder, output, device) = ASTFeatureExtractor(), sys.argv[1:]
model = ASTModel(ASTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768)).eval().to(device)
for file in sorted(Path(folder).iterdir()):
    audio, rate = soundfile.read(file, dtype="float32", always_2d=True)
    audio, rows = soxr.resample(audio.mean(1), rate, 16000), []
    for start in range(0, len(audio), 163840):
        inputs = extract(audio[start : start + 163840], sampling_rate=16000, return_tensors="pt").to(device)
        with torch.no_grad(): rows.append(model(**inputs).last_hidden_state.mean(1).cpu().numpy())
    numpy.save(Path(output, file.name), numpy.concatenate(rows))"""
PLAIN = "transformers, AST of 5.5 M"


class Measured(NamedTuple):
    seconds: float
    cpu: float  # seconds of the CPU, of all threads
    peak: float  # MB


def measure(work: str, *arguments: str | Path) -> Measured:
    """What a Python process with the program `work` takes."""
    return measure_command(sys.executable, "-c", f"import sys\n{work}", *arguments)


def measure_command(*command: str | Path, environment: dict[str, str] | None = None) -> Measured:
    """What a command takes, with the processes that it starts; peak is that of the largest one."""
    begin = time.perf_counter()
    words = [*map(str, command)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})})
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return Measured(time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def noise(file: Path, seconds: float, rate: int, channels: int, seed: int) -> None:
    """Bursts of noise of changing loudness."""
    random = np.random.default_rng(seed)
    with soundfile.SoundFile(file, "w", rate, channels) as sound:
        for _ in range(max(1, round(4 * seconds))):
            sound.write(
                random.normal(0, 10 ** random.uniform(-3, -0.7), (min(rate // 4, int(rate * seconds)), channels))
            )


def long(args: argparse.Namespace, folder: Path) -> None:
    import pyarrow.parquet as pq

    for name, seconds in (("second", 1.0), ("long", 3600 * args.hours)):
        noise(folder / f"{name}.wav", seconds, 48_000, 2, 0)
    options = "--model", args.model, "--device", args.device
    print("| | seconds | of the CPU | peak MB |\n|---|---|---|---|")
    peaks = {}
    for kind in args.kinds:
        for name in ("second", "long"):
            output = folder / f"{name}-{kind}.parquet"
            found = measure(EMBED, folder / f"{name}.wav", "-o", output, "--kind", kind, *options)
            peaks[name] = found.peak
            print(f"| {name}, --kind {kind} | {found.seconds:.1f} | {found.cpu:.1f} | {found.peak:.0f} |", flush=True)
        print(f"| more than one second takes | | | **{peaks['long'] - peaks['second']:.0f}** |", flush=True)
    if args.whole:
        found = measure(WHOLE, folder / "long.wav", folder / "whole.npz", args.model)
        print(f"| whole file at once | {found.seconds:.1f} | {found.cpu:.1f} | {found.peak:.0f} |\n")
        whole = np.load(folder / "whole.npz")
        for kind in args.kinds:
            expected = {"scene": whole["scene"][None], "timestamps": whole["rows"]}
            file = pq.ParquetFile(folder / f"long-{kind}.parquet")
            parts = [expected[part] for part in (["scene", "timestamps"] if kind == "both" else [kind])]
            rows = (row for part in parts for row in part)
            worst = 0.0
            for batch in file.iter_batches(4096, columns=["embedding"]):
                for row in batch.column(0):
                    worst = max(worst, float(np.abs(row.values.to_numpy() - next(rows)).max()))
            print(f"- largest difference from the whole file, --kind {kind}: {worst:.1e}")


def short(args: argparse.Namespace, folder: Path) -> None:
    random = np.random.default_rng(1)
    (folder / "in").mkdir()
    for number in range(args.files):
        noise(folder / "in" / f"{number:06}.wav", random.uniform(1, 3), 16_000, 1, number)
    (folder / "few").mkdir()
    for file in sorted((folder / "in").iterdir())[: args.plain]:
        (folder / "few" / file.name).hardlink_to(file)
    print("| | files | seconds | of the CPU | files per second of the CPU | peak MB |\n|---|---|---|---|---|---|")

    def line(name: str, count: int, found: Measured) -> None:
        times = f"{found.seconds:.1f} | {found.cpu:.1f} | {count / found.cpu:.1f}"
        print(f"| {name} | {count:,} | {times} | {found.peak:.0f} |", flush=True)

    options = "--kind", "scene", "--model", args.model, "--device", args.device, "--precision", args.precision
    line(f"hear-ssam embed, {args.model}", args.files, measure(EMBED, folder / "in", "-o", folder / "out", *options))
    if importlib.util.find_spec("transformers"):
        line(PLAIN, args.plain, plain(folder / "few", args))


def plain(folder: Path, args: argparse.Namespace) -> Measured:
    """The files of a folder in a loop over transformers."""
    output = folder.with_name(f"{folder.name}-plain")
    output.mkdir()
    return measure(TRANSFORMERS, folder, output, args.device)


def real(args: argparse.Namespace, folder: Path) -> None:
    import soxr

    demo = find_audio((shipped("eval_tasks") / "demo" / "tasks").glob("*/16000"))
    sounds = (soxr.resample(soundfile.read(file, dtype="float32")[0], 16_000, 44_100) for file in itertools.cycle(demo))

    def write(name: str, files: int, seconds: float) -> float:
        """Files below `name`, each of as many sounds as make `seconds`, at least one; returns the seconds of all."""
        (folder / name).mkdir()
        whole = 0
        for number in range(files):
            with soundfile.SoundFile(folder / name / f"{number:06}.flac", "w", 44_100, 2) as file:
                frames = 0
                while not frames or frames < 44_100 * seconds:
                    sound = next(sounds)
                    file.write(np.stack([sound, sound], axis=1))
                    frames += len(sound)
            whole += frames
        return whole / 44_100

    def line(name: str, seconds: float, workers: str, found: Measured) -> None:
        times = f"{found.seconds:.1f} | {seconds / found.seconds:.0f} | {found.cpu:.1f} | {seconds / found.cpu:.0f}"
        print(f"| {name} | {seconds / 3600:.2f} | {workers} | {times} | {found.peak:.0f} |", flush=True)

    print("| | hours | workers | seconds | times real time | of the CPU | times real time | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    options = "--model", args.model, "--device", args.device, "--precision", args.precision
    for name, files, length in (("recording", 1, 3600 * args.hours), ("clips", args.clips, 0.0)):
        seconds = write(name, files, length)
        for workers in "12":
            output = folder / f"{name}-{workers}"
            found = measure(EMBED, folder / name, "-o", output, "--workers", workers, *options)
            line(f"{name}: hear-ssam embed, {args.model}", seconds, workers, found)
        if importlib.util.find_spec("transformers"):  # a tenth is enough of what is so much slower
            seconds = write(f"tenth-{name}", max(1, files // 10), length / 10)
            line(f"{name}, a tenth: {PLAIN}", seconds, "–", plain(folder / f"tenth-{name}", args))


def main(arguments: list[str]) -> int:
    parser = plain_parser("collections", __doc__)
    parser.add_argument("what", choices=("long", "short", "real"))
    parser.add_argument("--model", default="ssam_tiny")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--hours", type=float, default=1.0, help="of the long file and of the recording (default 1)")
    parser.add_argument("--kinds", nargs="+", default=["both"], help="both (default), scene")
    parser.add_argument("--whole", action="store_true", help="compare with the whole file at once (gigabytes)")
    parser.add_argument("--files", type=int, default=20_000, help="short ones (default 20000)")
    parser.add_argument("--clips", type=int, default=1000, help="of `real` (default 1000)")
    parser.add_argument("--plain", type=int, default=500, help="of them in the plain loop (default 500)")
    args = parser.parse_args(arguments)
    import torch

    conditions = facts(torch.get_num_threads(), "pyarrow") | {"made with": json.dumps(vars(args))}
    print(heading(f"hear-ssam embed: {args.what}", conditions), flush=True)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        {"long": long, "short": short, "real": real}[args.what](args, Path(folder))
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"\n- {time.perf_counter() - begin:.0f} s in all; load at the end: {load}")
    return 0
