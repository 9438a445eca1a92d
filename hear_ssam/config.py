"""What differs between the systems, as data: one frozen dataclass and the table of named encoders.

SSAM    Audio Mamba, Yadav & Tan, Interspeech 2024 (arXiv 2406.02178)
SSAST   its Transformer counterpart in the same paper, after Gong et al., AAAI 2022
AxLSTM  Yadav et al., Interspeech 2025 (arXiv 2408.16568): Vision-LSTM (mLSTM) blocks
SSAMBA  Shams et al., SLT 2024 (arXiv 2405.11831): bidirectional Vision-Mamba blocks
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import HearSsamError, unknown_name

Made = TypeVar("Made")


def check_fields(values: Any, kind: str, limits: Mapping[str, tuple[float, float]]) -> None:
    """Refuse a dataclass with a value of another type than annotated (an int serves as a float), not among the
    choices of a Literal, or outside `limits` (lowest and highest value, both allowed) with a HearSsamError."""
    for name, wanted in get_type_hints(type(values)).items():
        value = getattr(values, name)
        if get_origin(wanted) is Literal:
            if value not in get_args(wanted):
                raise unknown_name(f"{kind} {name}:", value, get_args(wanted))
        elif type(value) is not (get_origin(wanted) or wanted) and (wanted is not float or type(value) is not int):
            raise HearSsamError(f"{kind} {name} must be of type {wanted.__name__}, not {value!r}.")
        lowest, highest = limits.get(name, (0, 0))
        if name in limits and not lowest <= value <= highest:
            between = f"at least {lowest}" if highest == math.inf else f"between {lowest} and {highest}"
            raise HearSsamError(f"{kind} {name} must be {between}, not {value!r}.")


def from_plain(kind: type[Made], values: Mapping[str, Any], what: str) -> Made:
    """A dataclass of plain values; unknown and missing fields raise HearSsamError by name."""
    names = get_type_hints(kind)
    for name in values:
        if name not in names:
            raise unknown_name(what, name, names)
    try:
        return kind(**values)
    except TypeError as error:
        raise HearSsamError(f"incomplete {what}s: {error}.") from error


@dataclass(frozen=True)
class EncoderConfig:
    """Everything needed to build an encoder; stored inside every checkpoint.

    Units: `window_frames` and `patch_frames` are spectrogram frames (10 ms each), `n_mels` and `patch_mels` bands.
    Contradictory values raise HearSsamError with the name of the field.
    """

    system: Literal["ssam", "ssast", "axlstm", "ssamba"]
    block: Literal["mamba", "bimamba", "transformer", "mlstm"]
    embed_dim: int  # D
    depth: int
    # spectrogram; logmel: 80 HTK bands, per-clip standardisation; kaldi: 128 bands, data-set statistics
    frontend: Literal["logmel", "kaldi"] = "logmel"
    n_mels: int = 80
    window_frames: int = 200
    fbank_mean: float = -4.2677393  # kaldi only: (x - mean) / (2 std); AudioSet + LibriSpeech, the pre-training set
    fbank_std: float = 4.5689974
    # patches and positions
    patch_frames: int = 4
    patch_mels: int = 16
    # the slow index of the sequence: time (token = 5t + f) or frequency (64f + t)
    patch_order: Literal["time", "frequency"] = "time"
    positions: Literal["sincos", "learned"] = "sincos"  # stored either way; sincos is frozen
    mask_position: Literal["after", "before"] = "after"  # positions added after masking, or before (SSAM's release)
    # blocks
    expand: int = 3  # inner width over D of the recurrent mixers; hidden width over D of the Transformer's MLP
    state_dim: int = 24  # N, Mamba only
    conv_kernel: int = 4  # recurrent mixers
    num_heads: int = 0  # Transformer and mLSTM
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-6
    paired: bool = False  # bimamba: layers in forward/backward pairs, both residuals added (SSAMBA)
    flip_odd: bool = False  # mlstm: odd blocks read the sequence backwards
    final_norms: int = 1  # SSAMBA applies its final norm twice
    # pre-training; reconstruction: MSE over all patches; joint: InfoNCE + 10 MSE over masked patches
    objective: Literal["reconstruction", "joint"] = "reconstruction"
    mask_ratio: float = 0.5
    # default order of embedding rows: time (ours) or official (for compatibility with published probes)
    token_order: Literal["time", "official"] = "time"
    readout_block: int = 0  # whose tokens are the embeddings, counted from 1; 0: the last, after the final norm
    # scene embeddings: the mean over time (as published), or mean and standard deviation side by side
    pooling: Literal["mean", "mean_std"] = "mean"
    whitening: bool = False  # scene embeddings go through the map that is stored with the weights (`encoder.Whitening`)

    def __post_init__(self) -> None:
        sizes = ("embed_dim", "depth", "n_mels", "window_frames", "patch_frames", "patch_mels", "expand", "state_dim",
                 "conv_kernel", "final_norms")  # fmt: skip
        check_fields(self, "config field", dict.fromkeys(sizes, (1, math.inf)))
        block, heads, frames, system = self.block, self.num_heads, self.window_frames, SYSTEMS[self.system]
        width, headed = self.inner_dim if block == "mlstm" else self.embed_dim, block in ("transformer", "mlstm")
        for name, wrong, why in (
            ("norm_eps", not 0 < self.norm_eps < math.inf, "must be positive"),
            ("fbank_std", not 0 < self.fbank_std < math.inf, "must be positive"),
            ("block", block != system["block"], f"contradicts system={self.system!r}, which has {system['block']!r}"),
            ("patch_mels", self.n_mels % self.patch_mels, f"does not divide n_mels={self.n_mels}"),
            ("patch_frames", frames % self.patch_frames, f"does not divide window_frames={frames}"),
            ("embed_dim", self.embed_dim % 4 and (self.positions == "sincos" or block == "mlstm"),
             "must be a multiple of 4 for sincos positions and mlstm"),
            ("num_heads", headed and (heads < 1 or width % heads), f"does not divide the width {width}"),
            ("num_heads", heads and not headed, f"has no meaning for block={block!r}"),
            ("paired", self.paired and (block != "bimamba" or self.depth % 2),
             "needs block='bimamba' and an even depth"),
            ("flip_odd", self.flip_odd and block != "mlstm", "needs block='mlstm'"),
            ("readout_block", not 0 <= self.readout_block <= self.depth or (self.paired and self.readout_block % 2),
             f"is none of {self.depth} blocks, or the first half of a pair"),
            ("mask_ratio", not 0 < self.mask_ratio < 1, "must lie between 0 and 1"),
        ):  # fmt: skip
            if wrong:
                raise HearSsamError(f"config field {name}={getattr(self, name)!r} {why}.")

    @property
    def grid(self) -> tuple[int, int]:
        """(time slots, bands) of one window's patches."""
        return self.window_frames // self.patch_frames, self.n_mels // self.patch_mels

    @property
    def num_patches(self) -> int:
        """Patches, that is tokens, of one window."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """Pixels of one patch."""
        return self.patch_frames * self.patch_mels

    @property
    def embedding_dim(self) -> int:
        """Width of timestamp embeddings: the tokens of all bands side by side (official SSAMBA: D)."""
        if self.frontend == "kaldi" and self.token_order == "official":
            return self.embed_dim
        return self.embed_dim * self.grid[1]

    @property
    def scene_dim(self) -> int:
        """Width of scene embeddings: that of the timestamp embeddings, twice where deviations stand beside means."""
        return self.embedding_dim * (2 if self.pooling == "mean_std" else 1)

    @property
    def inner_dim(self) -> int:
        """Width inside a recurrent mixer."""
        return self.embed_dim * self.expand

    @property
    def dt_rank(self) -> int:
        """Rank of the step sizes' projection."""
        return math.ceil(self.embed_dim / 16)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them; `from_dict` takes them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderConfig:
        """Rebuild a stored config; unknown or missing fields raise by name."""
        return from_plain(cls, values, "config field")


# What each system fixes; sizes below add width and heads.
SYSTEMS: dict[str, dict[str, Any]] = {
    "ssam": {"block": "mamba", "depth": 12},
    "ssast": {"block": "transformer", "depth": 12, "expand": 4},
    "axlstm": {"block": "mlstm", "depth": 12, "expand": 2, "num_heads": 4, "flip_odd": True},
    "ssamba": {
        "block": "bimamba", "depth": 24, "expand": 2, "state_dim": 16, "paired": True, "final_norms": 2,
        "norm_eps": 1e-5, "frontend": "kaldi", "n_mels": 128, "window_frames": 1024, "patch_frames": 16,
        "patch_mels": 16, "patch_order": "frequency", "positions": "learned", "objective": "joint",
        "mask_ratio": 400 / 512,
    },
}  # fmt: skip
WIDTHS = {"tiny": 192, "small": 384, "base": 768}


def build_config(system: str, embed_dim: int, **overrides: Any) -> EncoderConfig:
    """The config of a system at any width; `overrides` replace single fields (patch sizes, depth, ...)."""
    if system not in SYSTEMS:
        raise unknown_name("system", system, SYSTEMS)
    values = {"system": system, "embed_dim": embed_dim, **SYSTEMS[system]}
    if system == "ssast":
        values["num_heads"] = max(3, embed_dim // 64)
    return EncoderConfig.from_dict({**values, **overrides})


CONFIGS: dict[str, EncoderConfig] = {
    f"{system}_{size}": build_config(system, width, pooling="mean_std")
    for system in SYSTEMS for size, width in WIDTHS.items()
}  # fmt: skip
