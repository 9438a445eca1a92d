"""Writes what was measured into the card of a checkpoint and into README.md, from the records of `hear-ssam evaluate`.

    hear-ssam demo --out demo --probe logreg exact
    python checkpoints/card.py demo/results [RESULTS ...] [--private RESULTS ...]

What stands between the marks of the two files is made anew: all tables in the card, the demo's in README.md, in both
how much the encoder has heard. A card without marks gets them, at its end. Private tasks appear in the card alone; of
another checkpoint than the default one only the card is written.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hear_ssam.checkpoint import load_checkpoint
from hear_ssam.config import EncoderConfig
from hear_ssam.demo import TASK
from hear_ssam.errors import HearSsamError
from hear_ssam.evaluation.records import Record, read
from hear_ssam.evaluation.tables import markdown, tables
from hear_ssam.paths import shipped, write_whole

MARKS = "<!-- made by checkpoints/card.py -->\n", "<!-- end -->\n"
PRIVATE = """These tasks are a private development pack in HEAR's format that stands in for HEAR's tasks: **these are no
HEAR scores, and a reader cannot regenerate them.** Choices were made by them.
"""


def main(arguments: Sequence[str]) -> int:
    """Rewrite both files; exit code 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="of tasks that anyone can have")
    parser.add_argument("--private", type=Path, nargs="+", default=[], metavar="RESULTS", help="of private tasks")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="default: the one that ships")
    parser.add_argument("--readme", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    folder = shipped("checkpoints")
    readme = args.readme or (None if args.checkpoint else folder.parent / "README.md")
    try:
        write(args.checkpoint or folder / "ssam_tiny.safetensors", args.results, args.private, readme)
    except HearSsamError as error:
        print(f"card.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def write(checkpoint: Path, results: Sequence[Path], private: Sequence[Path], readme: Path | None) -> None:
    """Write the card beside `checkpoint`, and `readme`. Raises HearSsamError before either is touched."""
    config, _, info = load_checkpoint(checkpoint)
    told = heard(info, config)
    public, hidden = (_records(folders, info) for folders in (results, private))
    parts = [f"{told}\n", markdown(public)]
    if hidden:
        parts += [PRIVATE, markdown(hidden)]
    card = checkpoint.with_suffix(".md")
    text = card.read_text("utf-8") if card.exists() else f"# {info['name']}\n"
    if MARKS[0] not in text:
        text += "\n## How it does\n\n" + "".join(MARKS)
    filled = {card: _fill(card, text, "\n".join(parts))}
    if readme:
        filled[readme] = _fill(readme, readme.read_text("utf-8"), _demo(public, told))
    for path, text in filled.items():
        write_whole(path, text)


def _fill(path: Path, text: str, content: str) -> str:
    """`text` with what stands between the marks replaced."""
    before, first, rest = text.partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not last:
        raise HearSsamError(
            f"{path}: lacks the lines {' and '.join(map(str.strip, MARKS))}; put them where results go."
        )
    return before + first + content + last + after


def _records(folders: Sequence[Path], info: dict[str, Any]) -> list[Record]:
    """Records of these weights, first, and of other models; those of other weights of the same name are left out."""
    found = [record for folder in folders for record in read(folder)]
    own = [record for record in found if record["checkpoint_sha256"] == info["sha256"]]
    if folders and not own:
        where = ", ".join(map(str, folders))
        raise HearSsamError(f"{where}: holds no result of these weights ({info['sha256'][:8]}); evaluate them first.")
    names = {record["model"] for record in own}
    return own + [record for record in found if record["model"] not in names]


def heard(info: dict[str, Any], config: EncoderConfig) -> str:
    """How much audio a checkpoint was trained on, by itself and by what it started from."""
    windows, minutes, training = 0, 0.0, info.get("training", {})
    while training:
        windows += training.get("clips_seen", 0)
        minutes += training.get("wall_minutes", 0)
        before = training.get("init") or {}
        training = before.get("training", before)
    seconds = config.window_frames / 100
    return f"The encoder saw {windows:,} windows of {seconds:g} s in {minutes / 60:.1f} hours."


def _demo(records: list[Record], told: str) -> str:
    """The demo's table: accuracy and its standard error, by every probe that judged all models there are."""
    found = tables([r for r in records if (r["task"], r["protocol"]) == (TASK, "heareval")])
    models = max((table.models for table in found), key=len, default=[])
    if len(models) < 2:
        raise HearSsamError(f"RESULTS: hold no {TASK} of two models; run `hear-ssam demo` and name its results.")
    rows = [["probe", *(f"`{model}`" for model in models)], ["---"] * (1 + len(models))]
    for table in (table for table in found if set(table.models) == set(models)):
        scores, clips = [table.cells[TASK, model].mean for model in models], table.records[0]["clips"]
        errors = [math.sqrt(score * (1 - score) / clips) for score in scores]
        cells = [f"{100 * score:.1f} ± {100 * error:.1f}" for score, error in zip(scores, errors, strict=True)]
        rows.append([table.probe, *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", f"{told} The published models saw some 200 million.", ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
