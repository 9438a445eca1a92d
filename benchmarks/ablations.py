"""What in the recipe of SSAM matters: equal trainings that differ in one thing, judged by logistic regression.

    hear-ssam corpus store --audio recordings/
    python -m benchmarks ablations store --tasks-dir tasks       # nine times 20 minutes of one core

All read the same store for the same number of steps, with the same seed. The codes are those of block 8 of the
baseline; shares of the data are shares of the clips, drawn at random. Trainings stay in the folder of --runs and go on
there when the command is repeated.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hear_ssam.paths import shipped

from .cells import Cell, Row, canvas, machines, parser, piped, run, save

KEYS = ("training", "store", "steps", "batch", "seed")
# Fields of the encoder's config that a training changes; `recipe` and `data` change what it is trained on.
BASELINE = "baseline"
TRAININGS: dict[str, dict[str, Any]] = {
    BASELINE: {},  # causal, patches 4x16, positions after the mask, reconstruction, all of the data
    "patches 4x8": {"patch_mels": 8},
    "patches 8x16": {"patch_frames": 8},
    "bidirectional": {"system": "ssamba", "block": "bimamba"},  # at SSAM's grid, depth and width
    "positions before the mask": {"mask_position": "before"},
    "objective: joint": {"objective": "joint"},
    "objective: cluster codes": {"codes": True},
    "10 % of the data": {"share": 0.1},
    "30 % of the data": {"share": 0.3},
}


def main(arguments: list[str]) -> int:
    """`python -m benchmarks ablations`: ablations.csv, ablations.png and its section of README.md."""
    from hear_ssam.pretraining.store import open_store

    made = parser("ablations", __doc__ or "")
    made.add_argument("store", nargs="?", help="folder that `hear-ssam corpus` wrote")
    made.add_argument("--tasks-dir", type=Path, default=shipped("eval_tasks") / "demo" / "tasks", help="HEAR tasks")
    made.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="folder of the trainings")
    made.add_argument("--only", nargs="+", choices=TRAININGS, default=list(TRAININGS), metavar="TRAINING")
    made.add_argument("--steps", type=int, default=500, help="of each (default 500: 20 minutes of one core)")
    made.add_argument("--batch", type=int, default=16, help="windows of a step (default 16)")
    args = made.parse_args(arguments)
    if not args.store and not args.page:
        made.error("name the store to train on, or --page")
    digest = open_store(args.store).digest[:12] if args.store else ""
    where = {"_store": args.store, "_runs": str(args.runs.absolute()), "_tasks": str(args.tasks_dir.absolute())}
    cells = [
        dict(zip(KEYS, (name, digest, args.steps, args.batch, args.seed), strict=True)) | where for name in args.only
    ]
    return run(__name__, cells, args, lambda cell: cell["training"] != BASELINE)  # whose tokens others learn


def measure(cell: Cell) -> Iterator[Cell]:
    import torch

    from hear_ssam.checkpoint import load_checkpoint
    from hear_ssam.evaluation.preview import logistic_scores, named_tasks

    torch.set_num_threads(1)
    path = train(cell, cell["training"])
    _, _, info = load_checkpoint(path)
    told = info["training"]
    yield {name: told[name] for name in ("loss", "held_out_loss", "clips_seen", "wall_minutes")}
    scores = logistic_scores(path, named_tasks([cell["_tasks"]]), "cpu")
    yield {f"score {task}": f"{score:.4f}" for task, score in scores.items()}


def train(cell: Cell, name: str) -> Path:
    """The checkpoint of a training, which goes on where it was."""
    from hear_ssam.config import CONFIGS, EncoderConfig
    from hear_ssam.pretraining.codes import build_codes, encoder_features
    from hear_ssam.pretraining.loop import pretrain
    from hear_ssam.pretraining.recipe import Codes, Objective, Recipe
    from hear_ssam.pretraining.store import open_store

    changes = dict(TRAININGS[name])
    codes, share = changes.pop("codes", False), changes.pop("share", 1.0)
    config = CONFIGS["ablation"] = EncoderConfig.from_dict(CONFIGS["ssam_tiny"].to_dict() | changes)
    folder = Path(cell["_runs"], "-".join(str(cell[key]) for key in KEYS[1:]), name.replace(" ", "-"))
    store = linked(Path(cell["_store"]), folder / "store", share, cell["seed"])
    asked: dict[str, Objective] = {}
    if codes:
        asked = {"codes": Codes()}
        if not (store / "codes.json").exists():
            teacher = encoder_features(open_store(store), train(cell, BASELINE), 8, "cpu")
            build_codes(open_store(store), "codes", config, *teacher[1:])
    recipe = Recipe(
        "ablation", cell["steps"], cell["batch"], learning_rate=1e-3, mix_low=-15.0, mix_high=-3.0, seed=cell["seed"],
        objective=asked,
    )  # fmt: skip
    return pretrain(store, folder / "run", recipe, "cpu")


def linked(store: Path, folder: Path, share: float, seed: int) -> Path:
    """A store of the same files, in which only a share of the clips is trained on; all keep their held-out clips."""
    from hear_ssam.pretraining.store import HELD_OUT, open_store

    folder.mkdir(parents=True, exist_ok=True)
    for file in store.iterdir():
        if file.name != "left-out.tsv" and not file.name.startswith("codes") and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.absolute())
    opened = open_store(store)
    draw = random.Random(seed)
    left_out = sorted({*opened.left_out, *(i for i in range(len(opened)) if draw.random() >= share and i % HELD_OUT)})
    (folder / "left-out.tsv").write_text("".join(f"{i}\n" for i in left_out))
    return folder


HOW = """`python -m benchmarks ablations STORE --tasks-dir TASKS` makes this section, `ablations.csv` and
`ablations.png` from a store of yours (`hear-ssam corpus STORE --audio ...`): trainings of SSAM tiny that differ in
one thing from the baseline (causal, patches 4x16, positions after the mask, reconstruction, all of the data). Same
store, steps and seed; scores in % by logistic regression on frozen scene embeddings. Held-out losses of other
objectives or patches are not comparable. There is one training of each, and the standard error of a score of the
demo (`sound_kinds`) is 1.9 points by its clips alone: a difference below 4 points tells nothing."""


def page(rows: Sequence[Row], folder: Path) -> str:
    judged = [{name.removeprefix("score ") for name in row if name.startswith("score ") and row[name]} for row in rows]
    tasks = sorted(set.intersection(*judged)) if judged else []  # on which all trainings were judged

    def score(row: Row, task: str) -> float:
        return 100 * float(row[f"score {task}"])

    def mean(row: Row) -> float:
        return sum(score(row, task) for task in tasks) / len(tasks) if tasks else math.nan

    shown = [row for name in TRAININGS for row in rows if row["training"] == name]
    base = {tuple(row[key] for key in KEYS[1:]): mean(row) for row in shown if row["training"] == BASELINE}
    lines = []
    for row in shown:
        reference = base.get(tuple(row[key] for key in KEYS[1:]))
        more = "" if reference is None else f"{mean(row) - reference:+.1f}"
        lines.append((row["training"], row["steps"], row["clips_seen"], f"{float(row['held_out_loss']):.3f}",
                      f"{mean(row):.1f}", more, *(f"{score(row, task):.1f}" for task in tasks)))  # fmt: skip
    missing = [name for name in TRAININGS if name not in {row["training"] for row in rows}]
    if shown:
        figure, axes = canvas(1, 6, 0.8 + 0.3 * len(shown))
        axes.barh([f"{row['training']}, {row['steps']} steps" for row in shown], [mean(row) for row in shown])
        axes.invert_yaxis()
        axes.set_xlabel("mean score (%)")
        save(figure, folder / "ablations.png")
    return "\n".join([
        "## Ablations", "",
        f"{HOW} {machines(rows)}".strip(), "",
        *(["![Mean score of every training.](ablations.png)", "",
           piped(["training", "steps", "windows", "held-out loss", "mean", "against the baseline", *tasks], lines)]
          if rows else []),
        *([f"Not run yet: {', '.join(missing)}."] if missing else []),
    ])  # fmt: skip
