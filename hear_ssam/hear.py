"""The HEAR API: audio in, embeddings out (https://hearbenchmark.com/hear-api.html).

    model = load_model()                                         # the shipped ssam_tiny
    scene = get_scene_embeddings(audio, model)                   # audio (B, samples) float32, 16 kHz → (B, E)
    rows, milliseconds = get_timestamp_embeddings(audio, model)  # (B, T, E), (B, T)

The spectrogram of the whole clip is cut into windows, the encoder turns each window into tokens, and the tokens of
one moment, side by side for all bands, are one row. `token_order` says which tokens those are:

time      Row t holds the tokens of time slot t: `E[t, fD:(f+1)D]` is the token of slot t and band f. It is stamped
          with the centre of its frames and kept if that centre lies within the audio. No token is computed from
          padding, save that the last kept row may lack half of its frames; those are zero, the mean of the clip.
official  What the published code does. SSAM, SSAST and AxLSTM: the time-major tokens of a zero-padded window are
          regrouped as if they were band-major (`E[j, kD:(k+1)D] = token[50k + j]`), rows are stamped from 0.
          SSAMBA: rows are means over the bands, and the scene is the mean over all tokens, padding included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checkpoint import MODEL, find_weights, load_checkpoint, save_checkpoint
from .config import CONFIGS, EncoderConfig
from .encoder import Encoder, Undrawn, resize_positions
from .errors import HearSsamError, unknown_name
from .frontend import HOP, SAMPLE_RATE, WINDOW, LogMel, build_frontend, join, normalize
from .hub import layout
from .hub.weights import PUBLISHED, Weights, here, named
from .options import BASELINE, pick_device
from .scan import use_backend, why_not

DEFAULT = "ssam_tiny"
MILLISECOND = SAMPLE_RATE // 1000  # samples
# Tokens x width that go through the encoder at once. CPU: what stays near the caches (4 windows of ssam_tiny).
GROUP = {"cpu": 4 * 251 * 192}
GPU_GROUP = 128 * GROUP["cpu"]


class HearModel(nn.Module):
    """What the HEAR functions and the HEAR tools expect of a model; as it stands, the baseline without weights.

    `model(audio)` with audio (B, samples), float32 in [-1, 1], 16 kHz, gives the timestamp embeddings (B, T, E) and
    is differentiable. `checkpoint_sha256` is empty for random weights.
    The baseline's rows are the frames of 80 log-mel bands, its scenes their mean and standard deviation over time.
    """

    sample_rate: int = SAMPLE_RATE
    min_samples: int = WINDOW // 2 + 1  # reflect padding
    window_frames: int = 100  # that `encode` gets at once
    pooling: str = "mean_std"
    scene_of_all: bool = False  # rows of padding included

    def __init__(self, name: str = BASELINE, config: EncoderConfig | None = None, checkpoint_sha256: str = "") -> None:
        super().__init__()
        self.name = name
        self.config = config
        self.checkpoint_sha256 = checkpoint_sha256
        self.frontend = build_frontend(config) if config else LogMel()
        self.timestamp_embedding_size: int = self.frontend.filters.shape[1]
        self.scene_embedding_size = 2 * self.timestamp_embedding_size

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> HearModel:
        """`load_model(name, **options)`, for a folder of `save_pretrained` or a repository on Hugging Face."""
        return load_model(name, **options)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where audio must be."""
        return next(itertools.chain(self.parameters(), self.buffers())).device

    def timestamps(self, samples: int) -> Tensor:
        """The time of each row of a clip of `samples` samples, in milliseconds: (T,) float64."""
        return torch.arange(self.frames(samples), dtype=torch.float64, device="cpu") * HOP / MILLISECOND

    def frames(self, samples: int) -> int:
        """How many frames of a clip of `samples` samples are encoded, those of padding included."""
        return 1 + samples // HOP

    def forward(self, audio: Tensor) -> Tensor:
        """Timestamp embeddings (B, T, E), float32."""
        return self.scene_and_rows(audio)[1]

    def scene_and_rows(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Scene embeddings (B, E') and timestamp embeddings (B, T, E) of one pass, float32."""
        audio = self.check(audio)
        count = len(self.timestamps(audio.shape[1]))
        if not len(audio):
            sizes = (0, self.scene_embedding_size), (0, count, self.timestamp_embedding_size)
            return audio.new_zeros(sizes[0]), audio.new_zeros(sizes[1])
        computed = join([rows[None] for rows in self.rows_of_each(self.spectrogram(audio))], dim=0)
        rows = computed[:, :count]
        return self.scene(rows, computed), rows

    def scene(
        self, rows: Tensor, computed: Tensor, pooling: str | None = None, layers: Sequence[int] | None = None
    ) -> Tensor:
        """Scene embeddings from the kept and from all computed rows, which are those of `layers`; `pooling` as in
        `load_model`, None: its own."""
        rows = computed if self.scene_of_all else rows
        pooled = mean_and_deviation(rows) if (pooling or self.pooling) == "mean_std" else rows.mean(1)
        return self.scene_of_pooled(pooled, layers)

    def scene_of_pooled(self, pooled: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Scene embeddings (B, E') of what is pooled of the rows of `layers`."""
        return pooled

    def rows_of_each(self, specs: Iterable[Tensor], layers: Sequence[int] | None = None) -> list[Tensor]:
        """All rows (T', E) of each spectrogram (frames, mels), the T of the clip first: windows of one length are
        encoded together, whosever."""
        windows = [spec.split(self.window_frames) for spec in specs]
        together: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, parts in enumerate(windows):
            for index, part in enumerate(parts):
                together[len(part)].append((number, index))
        encoded: dict[tuple[int, int], Tensor] = {}
        for places in together.values():
            rows = self.encode(torch.stack([windows[number][index] for number, index in places]), layers)
            encoded.update(zip(places, rows, strict=True))
        return [join([encoded[number, i] for i in range(len(parts))], dim=0) for number, parts in enumerate(windows)]

    def spectrogram(self, audio: Tensor) -> Tensor:
        """What is encoded of clips (B, samples): (B, frames, mels)."""
        spec: Tensor = self.frontend(audio)
        return spec

    def encode(self, windows: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Windows of equal length (N, frames, mels) → rows (N, slots, E)."""
        return windows

    def check(self, audio: Tensor) -> Tensor:
        """`audio` as (B, samples); raises HearSsamError where it, or the weights, cannot be embedded with."""
        if isinstance(audio, Tensor) and audio.device != self.device:
            raise HearSsamError(f"audio is on {audio.device}, the model on {self.device}; move one with .to().")
        self.check_weights()
        return self.check_samples(audio)

    def check_weights(self) -> None:
        """Raises HearSsamError for weights that are not float32. It takes longer than a clip: once for many of them."""
        if other := {weight.dtype for weight in [*self.parameters(), *self.buffers()]} - {torch.float32}:
            mend = 'for half precision use load_model(..., precision="bf16"), which keeps the weights in float32'
            raise HearSsamError(f"the model's weights are {other.pop()}; call model.float(), and {mend}.")

    def check_samples(self, audio: Tensor) -> Tensor:
        """`audio`, wherever it is, as (B, samples); raises HearSsamError where no weights could embed it."""
        if not isinstance(audio, Tensor):
            raise HearSsamError(f"audio must be a torch.Tensor, not {type(audio).__name__}; use torch.from_numpy.")
        if audio.dtype != torch.float32:
            mend = {torch.int16: " / 32768", torch.int32: " / 2**31", torch.uint8: " / 128 - 1"}.get(audio.dtype, "")
            raise HearSsamError(f"audio must be float32 in [-1, 1], not {audio.dtype}; use audio.float(){mend}.")
        if audio.ndim == 1:
            audio = audio[None]
        if audio.ndim != 2:
            shape = tuple(audio.shape)
            raise HearSsamError(f"audio must have the shape (clips, samples), mono, not {shape}; average the channels.")
        if audio.shape[1] < self.min_samples:
            needed = f"{self.min_samples} ({1000 * self.min_samples / SAMPLE_RATE:g} ms at 16 kHz)"
            found = f"audio has {audio.shape[1]} samples"
            raise HearSsamError(f"{found}; {self.name} needs at least {needed}; pad it with zeros.")
        if getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)():  # torch 2.6 has only the latter
            return audio  # a graph cannot ask what the numbers are
        if broken := (~torch.isfinite(audio).all(dim=1)).nonzero().flatten().tolist():
            where = f" in clip {', '.join(map(str, broken))} of the batch (counted from 0)" if len(audio) > 1 else ""
            raise HearSsamError(f"audio has NaN or infinite samples{where}; leave them out or set them to 0.")
        return audio


class EncoderModel(HearModel):
    """A front end, an `Encoder`, and the order of its tokens."""

    config: EncoderConfig

    def __init__(self, name: str, config: EncoderConfig, encoder: Encoder, backend: str | None, digest: str) -> None:
        super().__init__(name, config, digest)
        self.window_frames, self.pooling = config.window_frames, config.pooling
        self.encoder = encoder
        self.info: dict[str, Any] = {}  # what the file of weights tells about itself: source, licence, training
        self.card = ""  # the text that lies beside it
        self.as_read: Tensor | None = None  # `some_weights` of the file
        self.backend = backend
        self.kaldi = config.frontend == "kaldi"
        self.official = config.token_order == "official"
        self.scene_of_all = self.kaldi and self.official
        self.scene_embedding_size, self.timestamp_embedding_size = config.scene_dim, config.embedding_dim
        if self.kaldi:  # one patch of whole frames
            self.min_samples = WINDOW + (config.patch_frames - 1) * HOP

    def some_weights(self) -> Tensor:
        """At most 64 numbers of each weight that is stored, which tell whether it was trained further."""
        weights = [x.flatten()[:: 1 + x.numel() // 64] for x in self.encoder.state_dict().values()]
        return torch.cat([some.float().cpu() for some in weights])

    def facts(self) -> tuple[dict[str, Any], str, str]:
        """`info`, `card` and the hash of the file of weights; what they were read from alone if they have changed."""
        if self.as_read is None or torch.equal(self.as_read, self.some_weights()):
            return self.info, self.card, self.checkpoint_sha256
        source = f"{self.name} ({self.checkpoint_sha256[:12]}), changed after it was loaded"
        return {"source": source, "licence": self.info.get("licence", "")}, "", ""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write a folder in Hugging Face's layout: weights, config, model card, and the code by which transformers'
        AutoModel and AutoFeatureExtractor load it. `load_model(folder)` gives the same embeddings."""
        path, (info, card, _) = Path(folder), self.facts()
        save_checkpoint(path / MODEL, self.config, self.encoder.state_dict(), {**info, "name": self.name})
        sizes = self.scene_embedding_size, self.timestamp_embedding_size
        layout.describe(path, self.name, self.config.to_dict(), sizes, info, card)
        return path

    def push_to_hub(self, repo: str, *, private: bool = False, token: str | None = None) -> str:
        """`save_pretrained` into the repository OWNER/NAME on Hugging Face, made if need be; its address.

        Needs the extra [hub]."""
        with tempfile.TemporaryDirectory() as folder:
            return layout.upload(self.save_pretrained(folder), repo, private, token)

    def timestamps(self, samples: int) -> Tensor:
        patch = self.config.patch_frames
        if self.kaldi:  # frames are not padded: the first is centred at 12.5 ms
            rows, start = self._frames(samples) // patch, (WINDOW + (patch - 1) * HOP) / 2
        elif self.official:
            window, frames = self.config.window_frames, self._frames(samples)
            padding, slots = window - frames % window, window // patch
            rows = (frames + padding) // window * slots - slots * padding // window
            return torch.arange(rows, dtype=torch.float64, device="cpu") * (samples / MILLISECOND / rows)
        else:  # centred frames: the first is centred at 0
            start = (patch - 1) * HOP / 2
            rows = max(1, math.floor((samples - start) / (patch * HOP)) + 1)
        return (start + patch * HOP * torch.arange(rows, dtype=torch.float64, device="cpu")) / MILLISECOND

    def _frames(self, samples: int) -> int:
        return 1 + ((samples - WINDOW) // HOP if self.kaldi else samples // HOP)

    def frames(self, samples: int) -> int:
        if self.official:
            return self.config.window_frames * math.ceil(self._frames(samples) / self.config.window_frames)
        return self.config.patch_frames * len(self.timestamps(samples))

    def spectrogram(self, audio: Tensor) -> Tensor:
        """Normalised spectrograms, cut or padded with zeros to the frames that are encoded; SSAMBA's zeros come before
        its statistics."""
        spec = self.frontend(audio)
        fit = (0, 0, 0, self.frames(audio.shape[1]) - spec.shape[1])
        if self.kaldi:
            return normalize(functional.pad(spec, fit), self.config)
        return functional.pad(normalize(spec, self.config), fit)

    def encode(self, windows: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """A bounded number of windows at a time. With `layers` the rows of these blocks stand side by side, as in
        `Encoder.hidden`."""
        bands = self.config.grid[1]
        tokens_per_window = 1 + windows.shape[1] // self.config.patch_frames * bands
        group = GROUP.get(windows.device.type, GPU_GROUP) // (tokens_per_window * self.config.embed_dim)
        with contextlib.nullcontext() if self.backend is None else use_backend(self.backend):
            parts = [
                join([self._regroup(tokens) for tokens in self.encoder.hidden(part, layers)], dim=2)
                for part in windows.split(max(1, group))
            ]
        return join(parts, dim=0)

    def scene_of_pooled(self, pooled: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Whitened, where the weights hold a map for these numbers: none for chosen `layers` or the official
        order."""
        if layers is not None or self.official or not self.config.whitening:
            return pooled
        whitened: Tensor = self.encoder.whitening(pooled)
        return whitened

    def _regroup(self, tokens: Tensor) -> Tensor:
        """The tokens of windows, class token first (N, 1 + n, D), as rows of all bands of a slot (N, slots, E)."""
        bands = self.config.grid[1]
        tokens = tokens[:, 1:].float()
        if self.config.patch_order == "frequency" or self.official:  # the band is, or is taken for, the slow index
            grid = tokens.unflatten(1, (bands, -1)).transpose(1, 2)  # (N, slots, bands, D)
        else:
            grid = tokens.unflatten(1, (-1, bands))
        rows: Tensor = grid.mean(2) if self.kaldi and self.official else grid.flatten(2)
        return rows


def mean_and_deviation(rows: Tensor) -> Tensor:
    """Rows (B, T, E) → their mean and (biased) standard deviation over time, side by side (B, 2 E)."""
    mean = rows.mean(1)
    variance = (rows - mean[:, None]).square().mean(1)
    still = variance == 0  # as of a single row: the root has no slope there, and its gradient would be NaN
    return torch.cat([mean, variance.where(~still, 1).sqrt() * ~still], dim=1)


def load_model(
    model_file_path: str | os.PathLike[str] | None = "", *, model: str = "", pretrained: bool = True, seed: int = 0,
    token_order: Literal["time", "official"] | None = None, pooling: Literal["mean", "mean_std"] | None = None,
    backend: str | None = None, precision: Literal["fp32", "bf16"] = "fp32", device: str = "cpu",
    window_frames: int | None = None, cache: str | os.PathLike[str] | None = None, **unknown: Any,
) -> HearModel:  # fmt: skip
    """Load a model, in eval mode.

    model_file_path  "" (the shipped ssam_tiny), a name of `available_models()` (the weights are downloaded if they
                     are not here), one of our files, an official `.pth` file or an official weights folder, a folder
                     of `save_pretrained`, or OWNER/NAME[@REVISION] on Hugging Face
    model            a name, where only options can be passed (`--model-options '{"model": "ssam_base"}'`)
    pretrained       False: random weights drawn from `seed`; needs a name
    token_order      "time" or "official"; default: what the file says (ours: time, official files: official)
    pooling          scene embeddings: "mean" over time, or "mean_std": mean and standard deviation, twice as wide;
                     default: what the file says (named models of ours: mean_std, official files: mean), which may
                     hold a whitening of them too (the shipped one does; `layers=` of `embed` leaves it out)
    backend          of the scan, as `hear-ssam doctor` lists them; it runs or raises. Default: the fastest
    precision        "fp32" or "bf16"
    device           where the weights go: auto, cpu, cuda, mps; one that is not there raises. The HEAR tools move the
                     model themselves
    window_frames    SSAMBA only: frames that the encoder sees at once (default 1024, 10.24 s)
    cache            folder of downloaded weights; default: $HEAR_SSAM_CACHE, else ~/.cache/hear_ssam

    Raises HearSsamError for an unknown name or option (with the nearest known one), contradictory options, weights that
    cannot be had (with the place where people can), and a file that is no checkpoint.
    """
    for option in unknown:
        raise unknown_name("option of load_model", option, load_model.__kwdefaults__ or ())
    path_like, model_file_path = (str, os.PathLike), model_file_path or ""
    typed: list[tuple[str, Any, Any]] = [("pretrained", pretrained, bool), ("seed", seed, Integral)]
    typed += [("model_file_path", model_file_path, path_like), ("device", device, (str, torch.device))]
    for option, value, kind in [*typed, ("model", model, str), ("cache", cache or "", path_like)]:
        if not isinstance(value, kind):
            raise HearSsamError(f"{option}={value!r}: has a wrong type, {type(value).__name__}; see help(load_model).")
    if backend not in (None, "auto") and (reason := why_not(backend)):
        raise HearSsamError(f"the backend {backend!r} cannot run here: {reason}.")
    path = os.fspath(model_file_path)
    if path and model:
        raise HearSsamError(f"load_model got both model_file_path={path!r} and model={model!r}; give one.")
    name = path or model or DEFAULT
    if name == BASELINE and (token_order or pooling or backend or window_frames or precision != "fp32"):
        raise HearSsamError(f"{BASELINE} has no encoder: its only options are model and device.")
    options = {"token_order": token_order, "pooling": pooling, "window_frames": window_frames}
    with torch.device("cpu"), torch.inference_mode(False):  # the same model inside anybody's block
        if name == BASELINE:
            return _move(HearModel(), device)
        info, card = dict[str, Any](), ""
        if name in CONFIGS and not pretrained:
            config, digest = _with_options(CONFIGS[name], options), ""
            with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
                torch.default_generator.manual_seed(seed)
                encoder = Encoder(config)
        else:
            if not pretrained and (named(name) or Path(name).exists() or "/" in name):
                raise HearSsamError(f"{name}: has its own weights; pass the name of a model with pretrained=False.")
            if not pretrained:
                raise unknown_name("model", name, [*CONFIGS, BASELINE])
            file, name = find_weights(name, cache)
            stored, state, info = load_checkpoint(file)
            card = layout.card_beside(file, name)
            config, digest = _with_options(stored, options), info["sha256"]
            if config.window_frames != stored.window_frames:
                state["pos_embed"] = resize_positions(state["pos_embed"], stored, config.grid[0])
            with Undrawn():
                encoder = Encoder(config)
            encoder.load_state_dict(state, assign=True)
        encoder.set_precision(precision)
        loaded = EncoderModel(name, config, encoder, backend, digest)
        loaded.info, loaded.card = info, card
        loaded.as_read = loaded.some_weights() if digest else None
        return _move(loaded, device)


def untrained(name: str, config: dict[str, Any]) -> EncoderModel:
    """A model whose weights are to be loaded, on the CPU whatever torch's default device; for transformers."""
    known = EncoderConfig.from_dict(config)
    with torch.device("cpu"):
        return EncoderModel(name, known, Encoder(known), None, "").eval()


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """One embedding per clip: audio (B, samples) float32 at 16 kHz → (B, scene_embedding_size) float32.

    Stays on the audio's device and builds no graph. Raises HearSsamError for audio that cannot be embedded.
    """
    with torch.no_grad():
        return _known(model).scene_and_rows(audio)[0]


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Embeddings over time: audio (B, samples) → (B, T, timestamp_embedding_size), milliseconds (B, T); float32.

    Stays on the audio's device and builds no graph. Raises HearSsamError for audio that cannot be embedded.
    """
    with torch.no_grad():
        rows = _known(model)(audio)
        times = model.timestamps(audio.shape[-1]).to(rows.device, torch.float32)
        return rows, times.repeat(len(rows), 1)


class ModelRow(NamedTuple):
    """What `available_models` knows of a model."""

    system: str
    parameters: int  # trainable, both prediction heads included
    scene_embedding_size: int
    timestamp_embedding_size: int
    window_seconds: float | None  # what the encoder sees at once; None: no windows
    weights: Path | None  # the file on this machine, shipped or downloaded
    published: Weights | None  # where they come from, their licence, paper and data; None: needs no weights


def available_models(cache: str | os.PathLike[str] | None = None) -> dict[str, ModelRow]:
    """Every model that `load_model` knows by name; NAME.TAG are other weights of it."""
    rows = {}
    for name, config in CONFIGS.items():
        published = next(entry for entry in PUBLISHED if entry.name == name)
        file = here(published, cache)
        if file:
            config = load_checkpoint(file)[0]
        with torch.device("cpu"), Undrawn():
            parameters = sum(weight.numel() for weight in Encoder(config).parameters() if weight.requires_grad)
        sizes, seconds = (config.scene_dim, config.embedding_dim), config.window_frames / 100
        rows[name] = ModelRow(config.system, parameters, *sizes, seconds, file, published)
    baseline = HearModel()
    sizes = baseline.scene_embedding_size, baseline.timestamp_embedding_size
    rows[BASELINE] = ModelRow("baseline", 0, *sizes, None, None, None)
    return rows


def _with_options(config: EncoderConfig, options: dict[str, Any]) -> EncoderConfig:
    if options["window_frames"] is not None and config.positions != "learned":
        raise HearSsamError(f"window_frames is an option of SSAMBA; {config.system} has fixed positions for 2 s.")
    return dataclasses.replace(config, **{name: value for name, value in options.items() if value is not None})


def _move(model: HearModel, device: str) -> HearModel:
    place = pick_device(device)
    try:
        return model.to(place).eval()
    except (RuntimeError, AssertionError) as error:  # of a driver, or for want of memory
        raise HearSsamError(f"device {device!r} cannot be used: {error}") from error


def _known(model: HearModel) -> HearModel:
    if not isinstance(model, HearModel):
        raise HearSsamError(f"model must come from hear_ssam.load_model, not be a {type(model).__name__}.")
    return model
