"""What a training depends on, beside its store: typed values, read from TOML.

    model = "ssam_tiny"          fields of Recipe, each also an option of the command
    visible_only = true
    mask_ratio = 0.75

    [objective.codes]            what is asked, each a class of OBJECTIVES with its own fields
    [objective.pixels]
    patches = "hidden"

Without a table of objectives a model is trained by the objective that its system was published with.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import CONFIGS, EncoderConfig, check_fields, from_plain
from ..errors import HearSsamError, unknown_name
from ..paths import read_toml

RECIPES = Path(__file__).parent / "recipes"  # the files that ship


@dataclass(frozen=True)
class Pixels:
    """Mean squared error of reconstructed patches; `normalised`: of patches with zero mean and unit variance each."""

    weight: float = 1.0
    patches: Literal["all", "hidden"] = "all"
    normalised: bool = False


@dataclass(frozen=True)
class Contrast:
    """InfoNCE between hidden patches and their predictions within a window (SSAST, SSAMBA)."""

    weight: float = 1.0


@dataclass(frozen=True)
class Codes:
    """Cross entropy of the cluster of each hidden patch; `file` names what `hear-ssam codes` put beside the store."""

    weight: float = 1.0
    file: str = "codes"


@dataclass(frozen=True)
class Latents:
    """Smooth L1 distance of hidden patches to the tokens, normalised, that a moving average of the encoder has after
    `block` blocks when it reads everything."""

    weight: float = 1.0
    block: int = 8
    momentum: float = 0.999


Objective = Pixels | Contrast | Codes | Latents
OBJECTIVES: dict[str, type[Objective]] = {"pixels": Pixels, "contrast": Contrast, "codes": Codes, "latents": Latents}
LIMITS: dict[str, tuple[float, float]] = {
    "steps": (1, math.inf), "batch_size": (1, math.inf), "accumulate": (1, math.inf), "learning_rate": (0, 1),
    "warmup": (0, 1), "weight_decay": (0, 1), "clip_norm": (0, 1e9), "min_frames": (1, math.inf),
    "max_frames": (1, math.inf), "mix": (0, 1), "mix_low": (-100, 100), "mix_high": (-100, 100), "pad": (0, 1),
    "gain": (0, 100), "mask_ratio": (0, 1), "decoder_depth": (1, 100), "decoder_expand": (1, 16),
    "seed": (0, 2**63 - 1), "weight": (0, 1e6), "block": (1, 1000), "momentum": (0, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Field names are the keys of a recipe file and the command's options.

    A value of another type, out of its range, or that contradicts another one raises HearSsamError with its field.
    """

    model: str = "ssam_tiny"
    steps: int = 20_000
    batch_size: int = 256
    accumulate: int = 1  # parts into which each process cuts its share of a batch, one after another
    learning_rate: float = 6e-4  # peak: linear warm-up, then half a cosine to 0
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.05  # on tensors of two and more dimensions
    clip_norm: float = 1.0  # of the gradient; 0 switches it off
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; the scan's step, transition, state stay float32
    min_frames: int = 200  # a step draws clips of one length between these, standardises each as a whole ...
    max_frames: int = 600  # ... and trains on one window of it, as at inference
    mix: float = 0.5  # share of clips to which another one is added ...
    mix_low: float = -10.0  # ... at least and
    mix_high: float = 10.0  # at most so many dB above the power of the clip
    pad: float = 0.5  # share of short clips padded with silence; the others are repeated
    gain: float = 0.0  # every clip is made louder or softer by up to so many dB; without effect after standardisation
    mask: Literal["published", "random", "time", "cluster"] = "published"
    mask_ratio: float = 0.0  # share of hidden patches; 0: as the system was published
    separate_masks: bool = False  # a mask, and a pass, of its own for every objective, as SSAMBA
    visible_only: bool = False  # the encoder skips hidden patches, a light decoder of the same block predicts them
    decoder_depth: int = 1
    decoder_expand: int = 2
    seed: int = 0
    init: str = ""  # a checkpoint file whose weights the run starts from; empty: random ones
    objective: dict[str, Objective] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "recipe field", LIMITS)
        if self.model not in CONFIGS:
            raise unknown_name("recipe field model:", self.model, CONFIGS)
        for name, objective in self.objective.items():
            if type(objective) is not OBJECTIVES.get(name):
                raise HearSsamError(f"recipe field objective.{name} must be a value of {OBJECTIVES.get(name)}.")
            check_fields(objective, f"recipe field objective.{name}:", LIMITS)
        config, asked = CONFIGS[self.model], self.objective
        window, low, high = config.window_frames, self.min_frames, self.max_frames
        block = max((o.block for o in asked.values() if isinstance(o, Latents)), default=0)
        louder = "adds clips that are louder than the one whose codes are asked; set at most 0."
        no_head = "no contrastive head; set visible_only, whose heads are the recipe's, or name a model of SSAMBA."
        lacks_head = "contrast" in asked and not self.visible_only and config.objective != "joint"
        blocks = f"{config.depth}{', in pairs' * config.paired}"
        no_block = block > config.depth or (config.paired and block % 2)
        patches = config.grid[0] if self.mask == "time" else config.num_patches
        hidden = round(patches * (self.mask_ratio or config.mask_ratio))
        decoder = (self.decoder_depth, self.decoder_expand) != (Recipe.decoder_depth, Recipe.decoder_expand)
        for message, wrong in {
            f"min_frames={low} is below the window of {self.model}; set at least {window}.": low < window,
            f"max_frames={high} is below min_frames={low}; raise it.": high < low,
            f"mix_high={self.mix_high} is below mix_low={self.mix_low}; raise it.": self.mix_high < self.mix_low,
            f"mix_high={self.mix_high} {louder}": "codes" in asked and self.mix and self.mix_high > 0,
            f"mask_ratio={self.mask_ratio} hides {hidden} of {patches}; hide some, not all.": not 0 < hidden < patches,
            "decoder_*: without visible_only there is no decoder; set it.": decoder and not self.visible_only,
            f"objective.latents: block={block}, but {self.model} has {blocks}.": no_block,
            f"objective.contrast: {self.model} has {no_head}": lacks_head,
            "objective: every weight is 0; nothing would be learned.": asked
            and not any(o.weight for o in asked.values()),
        }.items():
            if wrong:
                raise HearSsamError(f"recipe field {message}")

    def objectives(self, config: EncoderConfig) -> dict[str, Objective]:
        """What is asked: the table of the recipe, or what the system was published with."""
        if config.objective == "joint" and not self.objective:
            return {"contrast": Contrast(), "pixels": Pixels(weight=10.0, patches="hidden")}
        return dict(self.objective) or {"pixels": Pixels()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a file."""
        return dataclasses.asdict(self)


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe of plain values; unknown fields raise by name."""
    table, objective = values.get("objective", {}), {}
    if not isinstance(table, Mapping) or not all(isinstance(v, Mapping) for v in table.values()):
        raise HearSsamError("recipe field objective must hold tables: [objective.pixels], [objective.codes], ...")
    for name, fields in table.items():
        if name not in OBJECTIVES:
            raise unknown_name("recipe field objective:", name, OBJECTIVES)
        objective[name] = from_plain(OBJECTIVES[name], fields, f"recipe field of objective.{name}:")
    return from_plain(Recipe, {**values, "objective": objective}, "recipe field")


def read_recipe(path: str | os.PathLike[str], **options: Any) -> Recipe:
    """The recipe of a TOML file, or the shipped one of a name, in which `options` win; errors name the file."""
    names = {file.stem: file for file in RECIPES.glob("*.toml")}
    file = names.get(str(path), Path(path))
    if not (file.suffix or file.exists()):
        raise unknown_name("recipe", path, names)
    where = " ".join([str(path), *(f"--{name.replace('_', '-')} {value}" for name, value in options.items())])
    values = read_toml(file)
    try:
        return from_dict(values | options)
    except HearSsamError as error:
        raise HearSsamError(f"{where}: {error}") from error
