"""The Markdown card of a checkpoint: what it is, what it was trained on and under which licences, and how."""

from __future__ import annotations

import json
from typing import Any

from ..config import CONFIGS
from .recipe import RECIPES, Recipe, read_recipe


def model_card(facts: dict[str, Any], sources: list[dict[str, Any]]) -> str:
    """The card of a checkpoint that holds `facts`."""
    training = facts["training"]
    lines = [
        f"# {facts['name']}",
        "",
        f"An encoder of hear_ssam, pre-trained on unlabelled audio. Weights: {facts['licence']}.",
        "",
        "## Training",
        "",
        *_course(training),
        "",
        "## Data",
        "",
        "No audio is distributed here. Sources, with their licences and the attribution that they ask for:",
        "",
        "| source | clips | hours | licence | attribution |",
        "|---|---|---|---|---|",
    ]
    for row in sources:
        terms = f"{row.get('licence', 'not stated')} | {row.get('attribution', '')}"
        lines.append(f"| {row['name']} | {row['clips']:,} | {row['hours']:.2f} | {terms} |")
    return "\n".join(lines) + "\n"


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
        "",
        *([] if before else ["    hear-ssam corpus STORE --audio FOLDERS"]),
        *(["    hear-ssam codes STORE --checkpoint TEACHER"] if "codes" in recipe.get("objective", {}) else []),
        f"    hear-ssam pretrain STORE OUT {_as_options(recipe)}",
    ]


def _as_options(recipe: dict[str, Any]) -> str:
    """The options that make this recipe; objectives stand in a file, perhaps in one that ships."""
    shipped = {path.stem: read_recipe(path).to_dict() for path in sorted(RECIPES.glob("*.toml"))}
    asked = recipe.get("objective", {})
    name = next((k for k, v in shipped.items() if v["objective"] == asked), "RECIPE.toml") if asked else ""
    default, words = shipped.get(name, Recipe().to_dict()), [f"--recipe {name}"] if name else []
    for field, value in recipe.items():
        if field != "objective" and value != default.get(field):
            option = field.replace("_", "-")
            words.append(f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option} {value}")
    return " ".join(words)
