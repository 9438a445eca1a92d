"""Audio models of `transformers` as a HEAR module: `hf:NAME|FOLDER`, with options in JSON after the name.

    layer     -1: the model's output (default); n: the hidden states before block n, as transformers counts them
    pooling   mean, max, mean_std (both side by side) of a scene's rows, or first: the first token (AST: its class)
    window    seconds that the model sees at once (default: its feature extractor's, else 30); longer clips take several
    trust_remote_code, revision, code_revision, subfolder, dtype, attn_implementation   as in `from_pretrained`; code
              that comes with weights runs only if it is asked for

Sample rate and preprocessing are those of the feature extractor. What it pads (Whisper to 30 s, AST, CLAP to 10 s) is
embedded and then left out. Tried: wav2vec 2.0, HuBERT, WavLM, Data2Vec, AST, Whisper's encoder, CLAP's audio tower; a
model whose output is (clips, rows, width), or (clips, width, frequency, time), will do.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import HearSsamError, unknown_name
from .module import weights_sha256

POOLING = ("mean", "max", "mean_std", "first")
_ASKED = ("trust_remote_code", "revision", "code_revision", "subfolder", "dtype", "attn_implementation")
_LEAST = 0.1  # seconds that a model is given at least; the rest is silence


class HubEncoder(torch.nn.Module):
    """A model of transformers with the attributes of the HEAR API."""

    def __init__(self, model: Any, extractor: Any, name: str, layer: int, pooling: str, window: float | None) -> None:
        super().__init__()
        if pooling not in POOLING:
            raise unknown_name("pooling", pooling, POOLING)
        if type(layer) is not int:
            raise HearSsamError(f"layer={layer!r}: must be a whole number; -1 is the model's output.")
        encoder = model.get_encoder() if model.config.is_encoder_decoder else model
        self.encoder = getattr(encoder, "audio_model", encoder)
        self.extractor, self.layer, self.pooling = extractor, layer, pooling
        self.name = f"hf:{name}"
        settings = {**self.encoder.config.to_dict(), "extractor": extractor.to_dict()}
        settings |= {"transformers_version": "", "_name_or_path": "", "weights": weights_sha256(self.encoder)}
        self.checkpoint_sha256 = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self.sample_rate = int(extractor.sampling_rate)
        # samples that every input is padded or cut to; None where inputs are taken as they are
        self.padded = getattr(extractor, "n_samples", getattr(extractor, "nb_max_samples", None))  # of Whisper, of CLAP
        hop = self.sample_rate // 100  # a frame of AST
        if type(extractor).__name__.startswith("AST"):
            self.padded = extractor.max_length * hop
        config = self.encoder.config  # samples from row to row, where it says so: wav2vec 2.0 and its kin, AST
        self.step = getattr(config, "inputs_to_logits_ratio", getattr(config, "time_stride", 0) * hop)
        samples = self.padded or 30 * self.sample_rate
        if window is not None and not (isinstance(window, int | float) and window >= _LEAST):
            raise HearSsamError(f"window={window!r}: must be at least {_LEAST} seconds.")
        self.window = samples if window is None else min(samples, round(window * self.sample_rate))
        self.eval()
        rows, _ = self.tokens(torch.zeros(1, min(self.window, self.sample_rate)))
        self.timestamp_embedding_size = rows.shape[2]
        self.scene_embedding_size = rows.shape[2] * (1 + (pooling == "mean_std"))

    @torch.no_grad()
    def tokens(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """The model's view of one window (clips, samples): rows in time (clips, rows, width), and the first token."""
        parameter = next(self.encoder.parameters())
        arrays = list(audio.float().cpu().numpy())
        given = self.extractor(arrays, sampling_rate=self.sample_rate, return_tensors="pt")
        given = given.to(parameter.device, parameter.dtype)
        if "is_longer" in given:  # CLAP with fusion: by chance it takes one clip of a batch for longer than its window
            given["is_longer"] = torch.zeros_like(given["is_longer"])
        output = self.encoder(**given, output_hidden_states=self.layer != -1, return_dict=True)
        hidden = getattr(output, "last_hidden_state", None)
        if not isinstance(hidden, Tensor) or hidden.ndim not in (3, 4):
            mend = "it needs a last_hidden_state (clips, rows, width); wrap the model, as xares:FILE.py"
            raise HearSsamError(f"{self.name}: returned a {type(output).__name__}; {mend}.")
        if self.layer != -1:
            if hidden.ndim != 3:
                raise HearSsamError(f"layer={self.layer}: {self.name} has rows in time at its output alone; take -1.")
            states = output.hidden_states
            if not -len(states) <= self.layer < len(states):
                raise HearSsamError(f"layer={self.layer}: {self.name} has {len(states)}; take 0 to {len(states) - 1}.")
            hidden = states[self.layer]
        if hidden.ndim == 4:  # (clips, width, frequency, time)
            hidden = hidden.mean(2).transpose(1, 2)
        config = self.encoder.config
        first = hidden[:, 0]
        if config.model_type == "audio-spectrogram-transformer":  # class and distillation token, then band after band
            bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
            hidden = hidden[:, 2:].unflatten(1, (bands, -1)).mean(1)
        return hidden, first

    def rows(self, audio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Audio (clips, samples) of any length: rows (clips, rows, width), their ms (rows,), the mean first token."""
        found, times, firsts = [], [], []
        for start in range(0, audio.shape[1], self.window):
            piece = audio[:, start : start + self.window]
            length = 1000 * piece.shape[1] / self.sample_rate
            missing = max(0, round(_LEAST * self.sample_rate) - piece.shape[1])
            piece = torch.nn.functional.pad(piece, (0, missing))
            rows, first = self.tokens(piece)
            even = (self.padded or piece.shape[1]) / rows.shape[1]
            step = self.step * max(1, round(even / self.step)) if self.step else even  # adapters take every n-th row
            ms = (torch.arange(rows.shape[1]) + 0.5) * (1000 * step / self.sample_rate)
            inside = max(1, int((ms < length).sum()))  # the rest is padding
            found.append(rows[:, :inside])
            times.append(1000 * start / self.sample_rate + ms[:inside].clamp(max=length))
            firsts.append(first)
        return torch.cat(found, 1), torch.cat(times), torch.stack(firsts).mean(0)


def load_model(
    model_file_path: str = "", layer: int = -1, pooling: str = "mean", window: float | None = None, **asked: Any
) -> HubEncoder:
    """The model of a name on the hub, or of a local folder that `save_pretrained` wrote.

    Raises HearSsamError for a name that is not there, a model that needs code of its own, a missing feature extractor.
    """
    try:
        import transformers
    except ImportError as error:
        raise HearSsamError("hf: needs the package transformers; pip install 'hear-ssam[hf]'.") from error
    if not model_file_path:
        raise HearSsamError("hf: name a model of the hub or a folder, as in hf:facebook/wav2vec2-base.")
    if unknown := next((option for option in asked if option not in _ASKED), None):
        raise unknown_name("option of hf:", unknown, ("layer", "pooling", "window", *_ASKED))
    kinds: Any = transformers
    asked = {"trust_remote_code": False, **asked}  # of `from_pretrained`, which would put a question otherwise
    try:
        extractor = kinds.AutoFeatureExtractor.from_pretrained(model_file_path, **asked)
        model, report = kinds.AutoModel.from_pretrained(model_file_path, output_loading_info=True, **asked)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            mend = 'it brings code of its own; add {"trust_remote_code": true} if you trust it'
        else:
            mend = f"{str(error).strip().splitlines()[0]}; check the name, the network and the folder"
        raise HearSsamError(f"hf:{model_file_path}: cannot be loaded: {mend}.") from error
    # no embedding depends on the one that is left out
    if missing := sorted(key for key in report["missing_keys"] if not key.endswith("masked_spec_embed")):
        text = f"hf:{model_file_path}: {len(missing)} weights are not in its files and stay random, {missing[0]} first."
        warnings.warn(text, stacklevel=2)
    name = Path(model_file_path).resolve().name if Path(model_file_path).is_dir() else model_file_path
    return HubEncoder(model, extractor, name, layer, pooling, window)


def wrap(model: object) -> HubEncoder | None:
    """A pair, a model of transformers and its feature extractor (or processor), as a HEAR model; None for another
    object."""
    pair: tuple[Any, Any] = model if isinstance(model, tuple) and len(model) == 2 else (None, None)
    encoder, extractor = pair[0], getattr(pair[1], "feature_extractor", pair[1])  # of a processor
    if not (hasattr(encoder, "config") and hasattr(extractor, "sampling_rate")):
        return None
    return HubEncoder(encoder, extractor, encoder.name_or_path or type(encoder).__name__, -1, "mean", None)


def get_scene_embeddings(audio: Tensor, model: HubEncoder) -> Tensor:
    """Audio (clips, samples) → (clips, scene_embedding_size)."""
    rows, _, first = model.rows(audio)
    if model.pooling == "first":
        return first
    if model.pooling == "max":
        return rows.amax(1)
    parts = [rows.mean(1), rows.std(1, unbiased=False)]
    return torch.cat(parts[: 1 + (model.pooling == "mean_std")], 1)


def get_timestamp_embeddings(audio: Tensor, model: HubEncoder) -> tuple[Tensor, Tensor]:
    """Audio (clips, samples) → (clips, rows, timestamp_embedding_size), ms (clips, rows)."""
    rows, ms, _ = model.rows(audio)
    return rows, ms.expand(len(audio), -1)
