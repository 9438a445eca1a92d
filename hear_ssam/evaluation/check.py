"""`hear-ssam check MODULE`: whether a module keeps HEAR's contract, check by check, with the reason for each.

The first checks are those of hear-validator 2021.0.6. The others find what it lets pass and what then spoils scores:
embeddings that depend on the rest of the batch, dropout left on, timestamps in seconds or drifting, NaN for silence,
short clips that crash.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..errors import HearSsamError
from ..options import add_model_options, parse_options

if TYPE_CHECKING:
    from torch import Tensor

    from .module import JudgedModule

SAMPLE_RATES = (16000, 22050, 32000, 44100, 48000)
LONG_SECONDS = 600.0
BURSTS, SPACING = 31, 4.3  # of the drift check; s
EXAMPLES = """examples:
  hear-ssam check hear_ssam
  hear-ssam check hearbaseline.naive
  hear-ssam check my_module --model weights.pt --model-options '{"width": 2}' --json
"""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check: ok, warning or error."""

    check: str
    level: str
    text: str
    validator: bool  # whether hear-validator makes this check too
    why: str


class _Warning(Exception):
    """Raised by a check for something that works but should be mended."""


class Checks:
    """The checks of one loaded model, in order; each method returns what it found or raises."""

    def __init__(self, hear: JudgedModule, long_seconds: float) -> None:
        import torch

        self.hear, self.long_seconds, self.torch = hear, long_seconds, torch

    def noise(self, clips: int, seconds: float) -> Tensor:
        """Uniform noise in ±0.5: (clips, samples) float32, the same at every call."""
        generator = self.torch.Generator().manual_seed(0)
        shape = clips, round(seconds * self.hear.sample_rate)
        noise = self.torch.rand(shape, generator=generator, dtype=self.torch.float32, device="cpu")
        return (noise - 0.5).to(self.hear.device)

    def scene(self, audio: Tensor) -> Tensor:
        with self.torch.no_grad():
            return self.tensor("get_scene_embeddings", self.hear.module.get_scene_embeddings(audio, self.hear.model))

    def timestamps(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        with self.torch.no_grad():
            returned = self.hear.module.get_timestamp_embeddings(audio, self.hear.model)
        if not isinstance(returned, tuple | list) or len(returned) != 2:
            raise HearSsamError("get_timestamp_embeddings must return a pair, embeddings and timestamps.")
        embedding, times = (self.tensor("get_timestamp_embeddings", part) for part in returned)
        return embedding, times

    def tensor(self, function: str, returned: object) -> Tensor:
        if not isinstance(returned, self.torch.Tensor):
            raise HearSsamError(f"{function} returned a {type(returned).__name__}; HEAR wants a torch.Tensor.")
        return returned

    # hear-validator's

    def sample_rate(self) -> str:
        rate = self.hear.sample_rate
        if rate not in SAMPLE_RATES:
            raise HearSsamError(f"sample_rate is {rate}; HEAR's tasks exist at {', '.join(map(str, SAMPLE_RATES))} Hz.")
        return f"{rate} Hz"

    def scene_embeddings(self) -> str:
        embedding = self.scene(self.noise(4, 2.74))
        expected = (4, self.hear.size("scene"))
        if tuple(embedding.shape) != expected or embedding.dtype != self.torch.float32:
            raise HearSsamError(f"4 clips gave {_describe(embedding)}; expected float32 {expected}.")
        if not self.torch.isfinite(embedding).all():
            raise HearSsamError("embeddings of noise hold NaN or infinite values.")
        return _describe(embedding)

    def timestamp_embeddings(self) -> str:
        warnings = []
        for seconds in (1.07, 1.98, 4.0):
            embedding, times = self.timestamps(self.noise(2, seconds))
            expected = (2, times.shape[-1], self.hear.size("timestamp"))
            if tuple(embedding.shape) != expected or tuple(times.shape) != expected[:2]:
                raise HearSsamError(f"{seconds} s gave {_describe(embedding)} and timestamps {_describe(times)}.")
            if {embedding.dtype, times.dtype} != {self.torch.float32}:
                raise HearSsamError(f"embeddings are {embedding.dtype}, timestamps {times.dtype}; HEAR wants float32.")
            ms, end = times[0].double(), seconds * 1000
            if ms[-1] > end:
                raise HearSsamError(f"the last timestamp is {ms[-1]:g} ms, the audio ends at {end:g} ms.")
            if len(ms) < 2:
                continue
            steps = ms.diff()
            hop = float(steps.mean())
            if (steps - hop).abs().max() > 1:
                raise HearSsamError(f"timestamps are not evenly spaced: {steps.min():g} to {steps.max():g} ms.")
            if hop > 50:
                warnings.append(f"a timestamp every {hop:.0f} ms is coarse, HEAR suggests 50 ms or less")
            if ms[0] > hop or end - ms[-1] > max(hop, 50):
                warnings.append(f"{seconds} s: timestamps from {ms[0]:g} to {ms[-1]:g} ms leave a gap at an end")
        if warnings:
            raise _Warning("; ".join(dict.fromkeys(warnings)))
        return f"{_describe(embedding)} every {hop:g} ms"

    # what it does not look at

    def evaluation_mode(self) -> str:
        modules = [name or "the model" for name, module in self.hear.model.named_modules() if module.training]
        if modules:
            raise _Warning(f"load_model leaves {modules[0]} in training mode; call model.eval(), nobody does it later.")
        return "load_model returns the model in evaluation mode"

    def repeatable(self) -> str:
        audio = self.noise(2, 1.5)
        first, second = self.scene(audio), self.scene(audio)
        if not self.torch.equal(audio, self.noise(2, 1.5)):
            raise HearSsamError("get_scene_embeddings changes the audio that it is given.")
        if not (change := _distance(first, second)) <= 1e-5:  # NaN is no agreement either
            raise HearSsamError(f"the same audio gives different embeddings (by {change:.1g} of their size).")
        return "the same audio gives the same embedding"

    def batch_independence(self) -> str:
        audio = self.noise(4, 2.0)
        audio[1] *= 0.1
        audio[2] *= 0.01
        worst = 0.0
        for function in (self.scene, lambda clip: self.timestamps(clip)[0]):
            together = function(audio)
            worst = max(worst, *(_distance(together[i : i + 1], function(audio[i : i + 1])) for i in range(4)))
        if not worst <= 1e-3:
            raise HearSsamError(f"an embedding depends on the other clips of its batch (by {worst:.1g} of its size).")
        return f"batch equals single clips (to {worst:.0e})"

    def milliseconds(self) -> str:
        last = float(self.timestamps(self.noise(1, 4.0))[1].max())
        if last <= 4:
            raise HearSsamError(f"the last timestamp of 4 s of audio is {last:g}: seconds? HEAR wants milliseconds.")
        return "timestamps are milliseconds"

    def drift(self) -> str:
        """Bursts early and late in long noise must move the embeddings at the same distance from their times.

        One burst is found to a timestamp's step; the median of `BURSTS` that fall on all parts of a step, much closer.
        """
        rate, seconds = self.hear.sample_rate, self.long_seconds
        audio = self.noise(1, seconds) * 0.01
        base, times = self.timestamps(audio)
        ms = times[0].double()
        step = float(ms[-1] - ms[0]) / max(1, len(ms) - 1) / 1000
        if not 0 < step < SPACING / 2:
            raise _Warning(f"cannot tell with a timestamp every {step:g} s")
        early = [step * (SPACING * (number + 1) // step + number / BURSTS) for number in range(BURSTS)]
        # so that late bursts lie as early ones do in windows of 1, 2, 4, 5, 10 and 20 s
        later, least = 20 * int((seconds - early[-1] - SPACING) / 20), 20 * math.ceil(early[-1] / 20)
        if later < least:
            needed = math.ceil(early[-1] + SPACING + least)
            raise _Warning(f"{seconds:g} s are too short to tell; --long needs {needed} s or more")
        late = [moment + later for moment in early]
        for moment in early + late:
            start = round(moment * rate)
            audio[:, start : start + rate // 50] += self.noise(1, 0.02)
        changed = (self.timestamps(audio)[0] - base)[0].square().sum(-1)

        def offset(moment: float) -> float:
            """ms from a burst to the timestamp that it moves most."""
            near = (ms - 1000 * moment).abs() < 500 * SPACING
            if not near.any():
                raise HearSsamError(
                    f"{seconds:g} s of audio have no timestamp near {moment:.0f} s, the last is {ms[-1]:g} ms."
                )
            return float(ms[near][int(changed[near].argmax())]) - 1000 * moment

        first, last = (statistics.median(map(offset, moments)) for moments in (early, late))
        found = f"bursts are found {first:+.0f} ms from their times early on and {last:+.0f} ms {later} s later"
        if abs(last - first) > max(1000 * step, 50) / 4:
            raise HearSsamError(f"timestamps drift: {found} ({(last - first) / later * 3.6:+.1f} s in an hour).")
        return found

    def silence(self) -> str:
        silent = self.torch.zeros_like(self.noise(1, 2))
        if not all(self.torch.isfinite(e).all() for e in (self.scene(silent), self.timestamps(silent)[0])):
            raise HearSsamError("digital silence gives NaN or infinite embeddings.")
        return "digital silence gives finite embeddings"

    def short_audio(self) -> str:
        for seconds in (0.3, 0.1, 0.03):
            try:
                frames = self.timestamps(self.noise(1, seconds))[1].shape[1]
                finite = self.torch.isfinite(self.scene(self.noise(1, seconds))).all() and frames > 0
            except (Exception, SystemExit) as error:
                message = f"{seconds} s of audio raises {type(error).__name__}: {error}"
                raise (HearSsamError(f"{message}.") if seconds == 0.3 else _Warning(message)) from error
            if not finite:
                raise HearSsamError(f"{seconds} s of audio gives no finite embedding.")
        return "clips down to 30 ms work"


# name, method, whether hear-validator checks it, why it matters
CHECKS: tuple[tuple[str, Callable[[Checks], str], bool, str], ...] = (
    ("sample rate", Checks.sample_rate, True, "HEAR publishes its tasks at five rates; others need resampling"),
    ("scene embeddings", Checks.scene_embeddings, True, "one float32 vector of scene_embedding_size per clip"),
    ("timestamp embeddings", Checks.timestamp_embeddings, True, "one vector per timestamp, 50 ms or less apart"),
    ("evaluation mode", Checks.evaluation_mode, False, "dropout that stays on makes every embedding another one"),
    ("repeatable", Checks.repeatable, False, "scores of embeddings that change cannot be repeated"),
    ("batch independence", Checks.batch_independence, False, "HEAR's kit chooses the batches, not the module"),
    ("milliseconds", Checks.milliseconds, False, "labels of event tasks are matched to timestamps in ms"),
    ("silence", Checks.silence, False, "HEAR's tasks have silent clips, and one NaN spoils a task"),
    ("short audio", Checks.short_audio, False, "FSD50K has clips of 0.3 s"),
    ("drift", Checks.drift, False, "a wrong step shifts the labels, the more the longer the recording"),
)


def check_model(hear: JudgedModule, long_seconds: float = LONG_SECONDS) -> Iterator[Finding]:
    """Run every check; what the module raises is a finding, not the end."""
    checks = Checks(hear, long_seconds)
    for name, check, validator, why in CHECKS:
        try:
            level, text = "ok", check(checks)
        except _Warning as warning:
            level, text = "warning", str(warning)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            named = isinstance(error, HearSsamError)
            level, text = "error", str(error) if named else f"{type(error).__name__}: {error}"
        yield Finding(name, level, text, validator, why)


def _describe(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference in parts of the largest value."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "check",
        help="whether a module keeps HEAR's contract",
        description="Check a module with the HEAR API: all that hear-validator checks, and what it misses. "
        "Exit code 1 where a check fails; warnings do not count.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("module", metavar="MODULE", help="importable module")
    add("--model", default="", metavar="NAME|FILE", help="the first argument of the module's load_model")
    add_model_options(parser)
    add("--long", type=float, default=LONG_SECONDS, metavar="SECONDS", help="audio of the drift check (default: 600 s)")
    add("--json", action="store_true", help="one JSON object per check instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .module import load_hear_model

    if not 1 <= args.long <= 86_400:
        raise HearSsamError(f"--long {args.long:g}: take seconds, from 1 to 86400; drift shows over minutes.")
    hear = load_hear_model(args.module, args.model, parse_options(args.model_options), args.device)
    levels = set()
    for finding in check_model(hear, args.long):
        levels.add(finding.level)
        origin = "hear-validator checks this too" if finding.validator else "hear-validator does not look"
        text = f"{finding.level:<8} {finding.check}: {finding.text}\n{'':<8} {finding.why} ({origin})"
        print(json.dumps(asdict(finding)) if args.json else text, flush=True)
    return int("error" in levels)
