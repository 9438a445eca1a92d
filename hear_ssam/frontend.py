"""Waveform → spectrogram frames, exactly as the encoders were trained on them.

LogMel      SSAM, SSAST, AxLSTM: 80 HTK mel bands, natural log, standardised per clip
KaldiFbank  SSAMBA: the 128-band Kaldi filterbank, normalised with data-set statistics

Both take 16 kHz mono, float, in [-1, 1], and give one frame every 10 ms. They hold no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import EncoderConfig

SAMPLE_RATE = 16_000
HOP = 160  # samples, 10 ms
WINDOW = 400  # samples, 25 ms
EPSILON = 2.0**-23  # float32 machine epsilon, the floor under every logarithm
BLOCK = 1 << 15  # frames whose spectra are in memory at the same time, some 100 MB


def mel(hertz: float) -> float:
    """A frequency on the HTK mel scale."""
    return 2595 * math.log10(1 + hertz / 700)


class LogMel(nn.Module):
    """Log-mel spectrogram: waveform (B, samples) → (B, 1 + samples // 160, n_mels), not yet standardised.

    Centred frames with reflect padding (so at least 201 samples), periodic Hann window, power spectrum,
    triangles of height 1 on the HTK mel scale between 50 and 8000 Hz, log(mel + 2^-23).
    Equal to torchaudio's MelSpectrogram(16000, n_fft=400, hop_length=160, f_min=50, n_mels=80).
    """

    pad = WINDOW // 2  # samples that are mirrored before and after the waveform
    window: Tensor
    filters: Tensor

    def __init__(self, n_mels: int = 80) -> None:
        super().__init__()
        low, high = mel(50), mel(SAMPLE_RATE / 2)
        edges = 700 * (10 ** (_linspace(low, high, n_mels + 2) / 2595) - 1)  # Hz, equidistant in HTK mel
        filters = _triangles(_linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1), edges)
        self.register_buffer("filters", filters, persistent=False)  # (bins, mels)
        self.register_buffer("window", torch.hann_window(WINDOW, dtype=torch.float32), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        return _in_blocks(F.pad(waveform[:, None], (self.pad, self.pad), mode="reflect")[:, 0], self.of_frames)

    def of_frames(self, frames: Tensor) -> Tensor:
        """Windows of the waveform (..., 400) → (..., n_mels)."""
        power = torch.view_as_real(torch.fft.rfft(frames * self.window)).square().sum(-1)  # (..., bins)
        return torch.log(_energies(power, self.filters) + EPSILON)


class KaldiFbank(nn.Module):
    """Kaldi filterbank: waveform (B, samples) → (B, 1 + (samples - 400) // 160, n_mels), not yet normalised.

    The clip's mean is removed first; then per frame (no padding at the edges): mean removal, pre-emphasis 0.97,
    symmetric Hann window, power spectrum of 512 points, triangles linear in mel = 1127 ln(1 + f/700) between
    20 and 8000 Hz, log(max(energy, 2^-23)). Equal to torchaudio's kaldi.fbank(waveform - mean, htk_compat=True,
    use_energy=False, window_type="hanning", num_mel_bins=128, dither=0, frame_shift=10).
    """

    pad = 0
    window: Tensor
    filters: Tensor

    def __init__(self, n_mels: int = 128) -> None:
        super().__init__()
        low, high = (1127 * math.log(1 + f / 700) for f in (20, SAMPLE_RATE / 2))
        bins = 1127 * torch.log(1 + _linspace(0, SAMPLE_RATE / 2, 257) / 700)  # mel
        filters = _triangles(bins, _linspace(low, high, n_mels + 2))
        self.register_buffer("filters", filters, persistent=False)  # (bins, mels)
        self.register_buffer("window", torch.hann_window(WINDOW, periodic=False, dtype=torch.float32), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        mean = waveform.mean(dim=1, keepdim=True)
        mean = mean + (waveform - mean).mean(dim=1, keepdim=True)  # rounded once, whatever the order of the first sum
        return _in_blocks(waveform - mean, self.of_frames)

    def of_frames(self, frames: Tensor) -> Tensor:
        """Windows of the waveform (..., 400) → (..., n_mels)."""
        frames = frames - frames.mean(dim=-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)  # the first sample precedes itself
        spectrum = torch.fft.rfft((frames - 0.97 * previous) * self.window, n=512)
        power = torch.view_as_real(spectrum).square().sum(-1)  # (..., bins)
        return torch.log(_energies(power, self.filters).clamp(min=EPSILON))


def _energies(power: Tensor, filters: Tensor) -> Tensor:
    with torch.autocast(power.device.type, enabled=False):  # a bfloat16 of the caller's has no use before the logarithm
        return power @ filters


def _in_blocks(waveform: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of all whole windows (B, F, 400) of a waveform (B, samples) → (B, F, mels), BLOCK frames at a time."""
    windows = waveform.unfold(1, WINDOW, HOP)  # a view
    return join([function(block) for block in windows.split(max(1, BLOCK // len(waveform)), dim=1)], dim=1)


def join(parts: list[Tensor], dim: int) -> Tensor:
    """torch.cat that does not copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def build_frontend(config: EncoderConfig) -> LogMel | KaldiFbank:
    """The front end that `config` names."""
    return LogMel(config.n_mels) if config.frontend == "logmel" else KaldiFbank(config.n_mels)


def standardize(spec: Tensor) -> Tensor:
    """Zero mean and unit (unbiased) standard deviation per clip, over all frames and bands of spec (B, F, mels)."""
    spec = spec - spec[:, :1, :1]  # a silent clip becomes exact zeros, not rounding errors divided by their deviation
    mean = spec.mean(dim=(1, 2), keepdim=True)
    return (spec - mean) / (spec.std(dim=(1, 2), keepdim=True) + 1e-8)


def normalize(spec: Tensor, config: EncoderConfig) -> Tensor:
    """What the encoder of `config` expects: standardised per clip (logmel) or by data-set statistics (kaldi)."""
    if config.frontend == "logmel":
        return standardize(spec)
    return (spec - config.fbank_mean) / (2 * config.fbank_std)


def _linspace(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float32)


def _triangles(points: Tensor, edges: Tensor) -> Tensor:
    """Filters (points, len(edges) - 2): filter j rises from edges[j] to 1 at edges[j + 1], falls to edges[j + 2].

    In float32, as the released encoders saw them: rounding the edges moves the log energies by up to 3e-4.
    """
    rising = (points[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - points[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)
