"""How well `hear-ssam corpus --check-against` finds recordings: recall by what was done to them, and false alarms.

    python -m benchmarks leaks                       # recall only, on the recordings of the shipped demo task
    python -m benchmarks leaks --tasks TASKS --others AUDIO -n 500

Every clip of the tasks is altered in each way and looked for among all of them; a hit is the clip itself, at any time.
False alarms are counted on clips that share no recording with the tasks (--others).
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
import soundfile

from hear_ssam.audio import Clip, find_audio, read_audio
from hear_ssam.paths import shipped
from hear_ssam.pretraining.leaks import VOTES, find_leaks
from hear_ssam.pretraining.store import Store

from . import plain_parser

RATE = 16_000
Audio = np.ndarray  # float32 (samples,) at 16 kHz


def coded(audio: Audio) -> Audio:
    """Through Ogg Vorbis at its lowest rate, some 16 kb/s."""
    file = io.BytesIO()
    soundfile.write(file, audio, RATE, format="OGG", subtype="VORBIS", compression_level=1.0)
    file.seek(0)
    return np.asarray(soundfile.read(file, dtype="float32")[0])


def cut(audio: Audio, seconds: float, generator: np.random.Generator) -> Audio:
    """A piece around the loudest moment, from any sample on."""
    size = min(int(seconds * RATE), 2 * len(audio) // 3)
    loudest = int(np.convolve(audio**2, np.ones(1600), "same").argmax())
    start = loudest - generator.integers(size // 4, 3 * size // 4 + 1)
    return audio[max(0, min(start, len(audio) - size)) :][:size]


def mixed(audio: Audio, other: Audio, decibels: float) -> Audio:
    """With another clip under it, so many decibels below its power."""
    other = np.resize(other, len(audio))
    gain = np.sqrt(np.square(audio).mean() / (np.square(other).mean() + 1e-12)) * 10 ** (-decibels / 20)
    return audio + gain.astype(np.float32) * other


ALTERED: dict[str, Callable[[Audio, Audio, np.random.Generator], Audio]] = {
    "moved by 100 samples": lambda x, y, g: np.pad(x, (100, 0)),
    "20 dB quieter": lambda x, y, g: 0.1 * x,
    "Ogg at its lowest rate": lambda x, y, g: coded(x),
    "2 s of it": lambda x, y, g: cut(x, 2, g),
    "1 s of it": lambda x, y, g: cut(x, 1, g),
    "another clip 6 dB below": lambda x, y, g: mixed(x, y, 6),
    "another clip as loud": lambda x, y, g: mixed(x, y, 0),
    "another clip 6 dB above": lambda x, y, g: mixed(x, y, -6),
    "2 s, another clip 3 dB below, -10 dB, Ogg": lambda x, y, g: coded(0.3 * mixed(cut(x, 2, g), y, 3)),
}


def in_memory(clips: list[Audio]) -> Store:
    data = [np.clip(np.rint(x * 32768), -32768, 32767).astype(np.int16) for x in clips]
    offsets = np.cumsum([0, *map(len, data)])
    return Store(np.concatenate(data), offsets, np.zeros(len(data), int), {})


def main(arguments: list[str]) -> int:
    parser = plain_parser("leaks", __doc__)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[shipped("eval_tasks") / "demo" / "tasks"],
        metavar="PATH",
        help="audio of test sets; default: the demo's",
    )
    parser.add_argument("--others", nargs="+", default=[], metavar="PATH", help="audio that shares nothing with them")
    parser.add_argument("-n", type=int, default=200, help="clips of each side at most (default 200)")
    args = parser.parse_args(arguments)
    generator, shuffle = np.random.default_rng(0), random.Random(0)

    def load(paths: list[str]) -> list[tuple[str, Audio]]:
        files = find_audio(paths)
        return [(str(file), read_audio(file, RATE)) for file in shuffle.sample(files, min(args.n, len(files)))]

    tasks, others = load(args.tasks), load(args.others or args.tasks)
    print(f"{len(tasks)} clips of tasks, {sum(len(x) for _, x in tasks) / RATE / 60:.1f} min\n")
    print(f"| altered | found, % (at least {VOTES} votes) |\n|---|---|")
    known = [Clip("", name, lambda x=x: x) for name, x in tasks]
    for way, alter in ALTERED.items():
        store = in_memory([alter(x, others[i % len(others)][1], generator) for i, (_, x) in enumerate(tasks)])
        found = sum(leak.known == tasks[leak.clip][0] for leak in find_leaks(store, known))
        print(f"| {way} | {100 * found / len(tasks):.0f} |", flush=True)
    if args.others:
        votes = [leak.votes for leak in find_leaks(in_memory([x for _, x in others]), known, votes=4)]
        print(f"\nother clips with at least N votes for one of the tasks, of {len(others)}:")
        print(*(f"{n}: {sum(v >= n for v in votes)}" for n in range(4, 13)), sep="   ")
    return 0
