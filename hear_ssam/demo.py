"""`hear-ssam demo`: the whole path on a small real task that ships with the package.

The default model and the log-mel baseline embed it and are probed as `hear-ssam evaluate` does it: by logistic
regression, unless heareval's slow probe is asked for. The table goes to the screen, a picture to disk: log-mel of a
recording, the embedding's first principal components on the same time axis, and the confusion matrix of the probe.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HearSsamError
from .options import BASELINE
from .paths import atomic_write, shipped

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    from .evaluation.evaluate import Probe
    from .evaluation.records import Record
    from .evaluation.tasks import Task

TASK = "sound_kinds-v2.0-full"
RECORDING = "beat-loop_amen_full"  # its clips are consecutive pieces of a drum break
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 11}
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # of the components; told apart by colour-blind readers too


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="embed and judge a small real task, print a table, draw a picture",
        description="Embed 706 clips of 25 kinds of sound with the default model and with the log-mel baseline, train "
        "a probe on each, print both scores, and draw what the model hears. Takes a minute or two.",
        epilog="""examples:
  hear-ssam demo
  hear-ssam demo --out somewhere
  hear-ssam demo --probe logreg exact       by the probe of heareval too, which takes some minutes more

The audio is CC0 and CC BY; eval_tasks/demo/README.md credits its authors.""",
    )
    parser.add_argument("--out", type=Path, default=Path("hear-ssam-demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--probe", nargs="+", choices=["logreg", "exact"], default=["logreg"], help="default: logreg")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    table, picture = run_demo(args.out, probes=args.probe)
    print(f"{table}\npicture: {picture}")
    return 0


def run_demo(
    out: Path, model_options: Mapping[str, Any] | None = None, probes: Sequence[Probe] = ("logreg",)
) -> tuple[str, Path]:
    """Evaluate the model that `model_options` name (default: the default) beside `logmel`; draw the picture.

    Returns the tables and the path of the picture, which shows the first of `probes`. What `out` holds already is not
    computed again.
    Raises HearSsamError where a part fails or `out` cannot be written.
    """
    from .evaluation.evaluate import run_evaluation
    from .evaluation.records import predictions_file
    from .evaluation.report import confusion_matrix, read_predictions
    from .evaluation.tables import terminal
    from .evaluation.tasks import read_task
    from .hear import load_model

    tasks_dir, results = shipped("eval_tasks") / "demo" / "tasks", out / "results"
    modules = [f"hear_ssam:{json.dumps(options)}" for options in (dict(model_options or {}), {"model": BASELINE})]
    evaluation = run_evaluation(modules, tasks_dir=tasks_dir, tasks=[TASK], results_dir=results, probe=probes)
    if evaluation.failures:
        raise HearSsamError(f"the demo failed: {'; '.join(evaluation.failures.values())}")
    records = sorted(evaluation.records, key=lambda record: record["model"] == BASELINE)  # the baseline last
    shown = [record for record in records if record["probe"] == probes[0]]
    task = read_task(tasks_dir / TASK)
    confusion = confusion_matrix(read_predictions(predictions_file(results, shown[0])))
    audio = read_recording(task, RECORDING)
    picture = out / "demo.png"
    draw(picture, audio, load_model(**dict(model_options or {})), confusion, task.labels, shown)
    return terminal(records), picture


def read_recording(task: Task, name: str) -> np.ndarray:
    """The clips `<name>-<number>.ogg` of the task, joined: float32 (samples,) at 16 kHz."""
    import numpy as np

    from .audio import read_audio

    clips = sorted(task.folder.glob(f"16000/*/{name}-*.ogg"))
    if not clips:
        raise HearSsamError(f"{task.folder} holds no clip of {name}; reinstall.")
    return np.concatenate([read_audio(clip, 16_000) for clip in clips])


def draw(
    path: Path, audio: np.ndarray, model: Any, confusion: np.ndarray, labels: Sequence[str], records: Sequence[Record]
) -> None:
    """Write the picture of a recording (samples,) as `model` hears it, and of its probe's confusion matrix."""
    import torch
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    from .frontend import LogMel
    from .hear import get_timestamp_embeddings

    waveform = torch.from_numpy(audio)[None]
    log_mel = LogMel()(waveform)[0].numpy()  # (frames, 80)
    rows, times = (result[0].numpy() for result in get_timestamp_embeddings(waveform, model))
    seconds = len(audio) / 16_000

    figure = Figure(figsize=(13.5, 6.2), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=[14, 0.35, 12, 0.35])
    mel, bar = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _draw_log_mel(mel, bar, log_mel, f"{RECORDING}, {seconds:g} seconds of a drum break: log-mel")
    components = figure.add_subplot(grid[1, 0], sharex=mel)
    _draw_components(components, rows, times / 1000, f"embedding of {model.name}")
    mel.tick_params(labelbottom=False)
    mel.set_xlim(0, seconds)
    scores = {r["model"]: r["score"] for r in records if r["fold"] is None and r["metric"] == "top1_acc"}
    accuracy = ", ".join(f"{name} {score:.1%}" for name, score in scores.items())
    title = f"probe of {model.name} on clips it was not trained on\naccuracy: {accuracy}"
    _draw_confusion(figure.add_subplot(grid[:, 2]), figure.add_subplot(grid[:, 3]), confusion, labels, title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_log_mel(axes: Axes, bar: Axes, log_mel: np.ndarray, title: str) -> None:
    import numpy as np

    from .frontend import mel

    decibel = log_mel.T * 10 / np.log(10)
    decibel -= decibel.max()
    edge = len(log_mel) * 0.01 - 0.005  # frame t is centred on 10 t ms
    extent = (-0.005, edge, mel(50), mel(8000))
    image = axes.imshow(decibel, origin="lower", aspect="auto", cmap="magma", extent=extent, vmin=-60, vmax=0)
    ticks = [125, 250, 500, 1000, 2000, 4000, 8000]
    axes.set_yticks([mel(f) for f in ticks], [f"{f / 1000:g}k" if f >= 1000 else str(f) for f in ticks])
    axes.set_ylabel("frequency / Hz")
    axes.set_title(title, **TITLE)
    axes.figure.colorbar(image, cax=bar, label="power / dB re loudest")


def _draw_components(axes: Axes, rows: np.ndarray, times: np.ndarray, title: str) -> None:
    from .evaluation.report import principal_components

    projected, shares = principal_components(rows, len(COLOURS))
    for number, (column, share, colour) in enumerate(zip(projected.T, shares, COLOURS, strict=True), 1):
        axes.plot(times, column, color=colour, linewidth=1.5, label=f"PC {number} ({share:.0%})")
    axes.set_xlabel("time / s")
    axes.set_ylabel("projection")
    axes.grid(True, linewidth=0.4)
    axes.set_title(title, **TITLE)
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(COLOURS)}
    axes.legend(**place, frameon=False, fontsize=9, handlelength=1.2, columnspacing=1.2)


def _draw_confusion(axes: Axes, bar: Axes, confusion: np.ndarray, labels: Sequence[str], title: str) -> None:
    import numpy as np

    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = axes.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(confusion):
        colour = "white" if share[row, column] > 0.55 else "black"
        axes.text(column, row, confusion[row, column], ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("predicted (number of clips)")
    axes.set_ylabel("true kind of sound")
    axes.set_title(title, **TITLE)
    axes.figure.colorbar(image, cax=bar, label="share of the true kind")
