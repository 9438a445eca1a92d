"""From which model to choose: scores with intervals beside speed and memory, of checkpoints that you name.

    python -m benchmarks comparison ssam=run/ssam_tiny.safetensors ssast=other/ssast_tiny.safetensors
    python -m benchmarks comparison NAME=FILE ... --probes logreg fewshot --tasks-dir tasks

Scores are those of `hear-ssam evaluate`, which keeps its results in the folder of --results; speed and memory are those
of scene embeddings of clips of 2, 10 and 60 seconds, one at a time, on one thread. Where a score is accuracy,
the CSV keeps which clips were right, so that significance is paired: the same clips, two models.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hear_ssam.errors import HearSsamError
from hear_ssam.paths import sha256, shipped

from .cells import Cell, Row, canvas, machines, medians, parser, piped, run, save, timed

KEYS = ("model", "sha256", "what", "task", "probe", "seed", "audio_s")
LENGTHS = (2, 10, 60)  # seconds
COLOURS = ("#1f6f8b", "#c44e52", "#2e8b57", "#6a51a3")
SEEDED = ("fewshot", "exact")  # probes that draw clips or weights anew by every seed


def main(arguments: list[str]) -> int:
    """`python -m benchmarks comparison`: comparison.csv, comparison.png and its section of README.md."""
    from hear_ssam.evaluation.folders import find_tasks

    made = parser("comparison", __doc__ or "")
    made.add_argument("models", nargs="*", metavar="NAME=FILE", help="checkpoints, and what the table calls them")
    made.add_argument("--tasks-dir", type=Path, default=shipped("eval_tasks") / "demo" / "tasks", help="default: demo")
    made.add_argument("--probes", nargs="+", choices=["logreg", *SEEDED], default=["logreg"])
    made.add_argument("--seeds", type=int, default=10, help="of the other probes (default 10; logreg has one)")
    made.add_argument("--results", type=Path, default=Path("runs/comparison"), help="folder of embeddings and records")
    args = made.parse_args(arguments)
    cells: list[Cell] = []
    for name, _, file in (model.partition("=") for model in args.models):
        if not Path(file).is_file():
            raise HearSsamError(f"{name}={file}: no such file; name models as NAME=FILE.")
        common = {"model": name, "sha256": sha256(Path(file))[:12], "_file": str(Path(file).absolute())}
        common |= {"_tasks": str(args.tasks_dir.absolute()), "_results": str(args.results.absolute())}
        nothing = dict.fromkeys(KEYS[3:], "")
        cells += [common | nothing | {"what": "speed", "audio_s": seconds} for seconds in LENGTHS]
        for task, probe in itertools.product(find_tasks(args.tasks_dir), args.probes):
            for seed in range(args.seeds if probe in SEEDED else 1):
                cells.append(common | nothing | {"what": "score", "task": task, "probe": probe, "seed": seed})
    return run(__name__, cells, args, lambda cell: cell["what"] == "score")


def measure(cell: Cell) -> Iterator[Cell]:
    import torch

    import hear_ssam

    torch.set_num_threads(1)
    if cell["what"] == "score":
        yield score(cell)
        return
    model = hear_ssam.load_model(cell["_file"])
    yield {"parameters": sum(weight.numel() for weight in model.parameters())}
    hear_ssam.get_scene_embeddings(torch.zeros(1, 16_000), model)  # what loads or compiles at first use
    found = timed(lambda audio: hear_ssam.get_scene_embeddings(audio, model), lambda: noise(cell["audio_s"]))
    yield medians(found)


def noise(seconds: int) -> Any:
    import torch

    return 0.1 * torch.randn(1, 16_000 * seconds, generator=torch.Generator().manual_seed(0))


def score(cell: Cell) -> Cell:
    """The score of one model, task, probe and seed; `right`: a 1 for every test clip whose class was found, else 0,
    where the score is their share: else it would give mAP or AUC the interval of another number."""
    from hear_ssam.evaluation.evaluate import run_evaluation
    from hear_ssam.evaluation.records import predictions_file
    from hear_ssam.evaluation.report import read_predictions

    results, count = Path(cell["_results"]), cell["seed"] + 1 if cell["probe"] in SEEDED else None
    done = run_evaluation(
        ["hear_ssam"], cell["_file"], results_dir=results, tasks_dir=Path(cell["_tasks"]), tasks=[cell["task"]],
        probe=cell["probe"], seeds=count, workers=1, device="cpu",
    )  # fmt: skip
    if done.failures:
        raise HearSsamError("; ".join(f"{name}: {reason}" for name, reason in done.failures.items()))
    record = max((r for r in done.records if r["fold"] is None and r["primary"]), key=lambda r: r["seed"])
    if record["score"] is None:
        raise HearSsamError(f"{record['task']}: {record['metric']} is not finite on its test clips; leave it out.")
    found, right = read_predictions(predictions_file(results, record)), ""
    if record["metric"] in ("top1_acc", "pitch_acc") and len(found.target) and (found.target.sum(1) == 1).all():
        right = "".join(map(str, (found.target.argmax(1) == found.prediction.argmax(1)).astype(int)))
    return {"score": f"{record['score']:.6f}", "metric": record["metric"], "right": right}


# --- the page -------------------------------------------------------------------------------------------------------


def clips(rows: Sequence[Row]) -> list[float]:
    """For every test clip in how many of the seeds it was right, in %: one model, task and probe."""
    return [100 * statistics.mean(map(int, column)) for column in zip(*(row["right"] for row in rows), strict=True)]


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean over test clips; 0 where there are none."""
    return 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def averaged(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The mean of values with halves of their 95 % intervals, and half of its own: tasks are taken as independent."""
    return statistics.mean(v for v, _ in values), sum(half**2 for _, half in values) ** 0.5 / len(values)


def mean(judged: Any, means: Any, probe: str, model: str) -> tuple[float, float] | None:
    """A model's mean score over the tasks on which the probe has judged all models, None where there are none, and half
    of its 95 % interval over the test clips of those that count clips."""
    rivals = {model for (_, by), found in means.items() if by == probe for model in found}
    tasks = [key for key, found in means.items() if key[1] == probe and found.keys() == rivals]
    return averaged([(means[key][model], interval(clips(judged[key][model]))) for key in tasks]) if tasks else None


def verdict(gap: float, half: float, p: float) -> tuple[str, str, str]:
    """The cells of a difference: itself, its p, whether that is below 5 %."""
    return f"{gap:+.1f} ± {half:.1f}", f"{p:.2g}", "yes" if p < 0.05 else "no"


def page(rows: Sequence[Row], folder: Path) -> str:
    from scipy.stats import norm, ttest_rel

    count = Counter(model for model, _ in {(row["model"], row["sha256"]) for row in rows})
    rows = [row | {"model": row["model"] + f"@{row['sha256'][:8]}" * (count[row["model"]] > 1)} for row in rows]
    speed = {(row["model"], row["audio_s"]): row for row in rows if row["what"] == "speed"}
    judged: dict[tuple[str, str], dict[str, list[Row]]] = {}  # task, probe → model → its seeds
    for row in rows:
        if row["what"] == "score":
            judged.setdefault((row["task"], row["probe"]), {}).setdefault(row["model"], []).append(row)
    means = {
        key: {model: statistics.mean(100 * float(row["score"]) for row in seeds) for model, seeds in found.items()}
        for key, found in judged.items()
    }
    scores, pairs, costs = [], [], []
    gaps: dict[tuple[str, str, str], list[tuple[float, float]]] = {}  # probe, two models → gap ± half of every task
    for key, found in judged.items():
        ordered = sorted(found, key=lambda model: -means[key][model])
        for model in ordered:
            half = interval(clips(found[model]))
            scores.append((*key, model, f"{means[key][model]:.1f} ± {half:.1f}" if half else f"{means[key][model]:.1f}",
                           len(found[model])))  # fmt: skip
        for a, b in itertools.combinations(ordered, 2):
            one, other, gap = clips(found[a]), clips(found[b]), means[key][a] - means[key][b]
            if one and len(one) == len(other):
                p = float(ttest_rel(one, other).pvalue)
                half = interval([x - y for x, y in zip(one, other, strict=True)])
                pairs.append((*key, f"{a} − {b}", *verdict(gap, half, p)))
                x, y = sorted((a, b))
                gaps.setdefault((key[1], x, y), []).append((gap if x == a else -gap, half))
    for (probe, a, b), values in gaps.items():
        if len(values) > 1:
            gap, half = averaged(values)
            p = float(2 * norm.sf(1.96 * abs(gap) / half)) if half else 1.0
            pairs.append((f"mean of {len(values)}", probe, f"{a} − {b}", *verdict(gap, half, p)))
    probes = list(dict.fromkeys(probe for _, probe in means))
    every = {(p, m): mean(judged, means, p, m) for (_, p), found in means.items() for m in found}
    overall = {key: one for key, one in every.items() if one}
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [speed.get((model, str(seconds))) for seconds in LENGTHS]
        said = [f"{float(c['cpu_ms']):,.0f} ms, {float(c['peak_mb']):,.0f} MB" if c else "not run" for c in cells]
        size = next((f"{float(c['parameters']) / 1e6:.1f} M" for c in cells if c), "")
        judgements = (overall.get((probe, model)) for probe in probes)
        costs.append((model, size, *said, *("{:.1f} ± {:.1f}".format(*one) if one else "" for one in judgements)))
    if rows:
        draw(overall, speed, folder / "comparison.png")
    return "\n".join([
        "## Comparison", "", f"{NOTE} {machines(rows)}", "",
        *(["![Score against time.](comparison.png)", "",
           "CPU time and memory above the loaded model, scene embeddings of one clip; mean score over tasks in %:", "",
           piped(["model", "parameters", *(f"{seconds} s of audio" for seconds in LENGTHS), *probes], costs),
           "Scores in % ± 95 % over test clips (the mean over seeds, where there are several):", "",
           piped(["task", "probe", "model", "score", "seeds"], scores),
           "Differences, paired by test clip (t-test, two-sided, not corrected for the number of pairs):", "",
           piped(["task", "probe", "models", "difference", "p", "below 5 %"], pairs)] if rows else ["Not run yet."]),
    ])  # fmt: skip


NOTE = """`python -m benchmarks comparison NAME=FILE ... --probes logreg fewshot` makes this section, `comparison.csv`
and `comparison.png`. The files here are `tiny` of all four systems, trained equally and briefly: each on 42 hours of
audio's worth of windows drawn from the 33 hours of the shipped weights (295 steps of 256; SSAMBA, whose windows are
longer, 115 of 128) with its published objective and masks, in bf16 on an NVIDIA H100. Three of them are
`checkpoints/*_tiny_equal.safetensors`; [their card](../checkpoints/equal.md) has the command for these, and how
SSAMBA's is made."""


def draw(overall: dict[tuple[str, str], tuple[float, float]], speed: Any, file: Path) -> None:
    """Mean scores over tasks against the time of a clip: a panel per length, a colour per model, a mark per probe."""
    colours = dict(zip({model: None for model, _ in speed}, itertools.cycle(COLOURS), strict=False))
    marks = dict(zip({probe: None for probe, _ in overall}, itertools.cycle("os^Dv"), strict=False))
    figure, panels = canvas(len(LENGTHS), 10, 3.2)
    for axes, seconds in zip(panels, LENGTHS, strict=True):
        for (probe, model), (score, half) in overall.items():
            if cell := speed.get((model, str(seconds))):
                style: dict[str, Any] = {"fmt": marks[probe], "color": colours[model], "label": f"{model}, {probe}"}
                axes.errorbar(float(cell["cpu_ms"]), score, half, **style)
        axes.set(title=f"{seconds} s of audio", xlabel="CPU time (ms)", ylabel="score (%)", xlim=(0, None))
    panels[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, file)
