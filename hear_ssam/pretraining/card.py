"""The Markdown card of a checkpoint: what it is, what it was trained on and under which licences, and how."""

from __future__ import annotations

import json
import shlex
from typing import Any

from ..config import CONFIGS
from .recipe import RECIPES, Recipe, read_recipe


def model_card(facts: dict[str, Any], sources: list[dict[str, Any]]) -> str:
    """The card of a checkpoint that holds `facts`."""
    rows = ""
    for row in sources:
        terms = f"{row.get('licence', 'not stated')} | {row.get('attribution', '')}"
        rows += f"| {row['name']} | {row['clips']:,} | {row['hours']:.2f} | {terms} |\n"
    course = "\n".join(_course(facts["training"]))
    return f"""# {facts["name"]}

An encoder of hear_ssam, pre-trained on unlabelled audio. Weights: {facts["licence"]}.

## Training

{course}

## Data

No audio is distributed here. Sources, with their licences and the attribution that they ask for:

| source | clips | hours | licence | attribution |
|---|---|---|---|---|
{rows}"""


def _course(training: dict[str, Any]) -> list[str]:
    """How a run went and its commands, after those of the run that it started from."""
    lines, before = [], training.get("init") or {}
    if before:
        lines = [*_course(before["training"]), ""] if before.get("training") else []
        lines += [f"Then, from those weights (sha256 `{before['sha256']}`):", ""]
    recipe = training["recipe"]
    seconds = CONFIGS[recipe["model"]].window_frames / 100
    return [
        *lines,
        f"- {training['clips_seen']:,} windows of {seconds:g} s, {training['epochs']} epochs of "
        f"{training['hours_of_audio']} h",
        f"- loss {training['loss']} (on held-out clips {training['held_out_loss']})",
        f"- {training['wall_minutes']} minutes on {training['device']}, torch {training['versions']['torch']}",
        f"- recipe: `{json.dumps(recipe)}`",
        *([f"- teacher of the codes: `{json.dumps(training['teacher'])}`"] if training.get("teacher") else []),
        "",
        *([] if before else ["    hear-ssam corpus STORE --audio FOLDERS"]),
        *(["    hear-ssam codes STORE --checkpoint TEACHER"] if "codes" in recipe.get("objective", {}) else []),
        f"    hear-ssam pretrain STORE OUT {_as_options(recipe)}",
    ]


def _as_options(recipe: dict[str, Any]) -> str:
    """The options that make this recipe; objectives stand in a file, perhaps in one that ships."""
    known = {path.stem: read_recipe(path).to_dict() for path in RECIPES.glob("*.toml")} | {"": Recipe().to_dict()}
    recipe = {"objective": {}, **recipe}
    known["RECIPE.toml"] = known[""] | {"objective": recipe["objective"]}
    changed = {name: {k: v for k, v in recipe.items() if v != base.get(k)} for name, base in known.items()}
    fitting = [name for name in sorted(changed) if "objective" not in changed[name]]
    name = min(fitting, key=lambda name: (name == "RECIPE.toml", len(changed[name])))
    words = ["--recipe", name] if name else []
    for field, value in changed[name].items():
        words.append(f"--{'no-' * (value is False)}{field.replace('_', '-')}")
        words += [] if isinstance(value, bool) else [str(value)]
    return shlex.join(words)
