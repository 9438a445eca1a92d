"""The front ends: physical properties, an independent library where it is installed, golden numbers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hear_ssam.config import CONFIGS
from hear_ssam.frontend import KaldiFbank, LogMel, build_frontend, normalize, standardize

FRONTENDS = pytest.mark.parametrize("frontend", [LogMel(), KaldiFbank()], ids=["logmel", "kaldi"])


def noise(batch: int, samples: int) -> Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(0)) * 0.1


def tone(frequency: float, samples: int = 8000) -> Tensor:
    return torch.sin(2 * math.pi * frequency * torch.arange(samples) / 16_000)[None] * 0.5


@pytest.mark.parametrize(("samples", "frames"), [(201, 2), (319, 2), (320, 3), (16_000, 101), (32_000, 201)])
def test_logmel_centres_a_frame_on_every_10_ms(samples: int, frames: int) -> None:
    assert LogMel()(noise(2, samples)).shape == (2, frames, 80)


@pytest.mark.parametrize(("samples", "frames"), [(400, 1), (559, 1), (560, 2), (160_000, 998), (80_000, 498)])
def test_kaldi_uses_whole_frames_only(samples: int, frames: int) -> None:
    assert KaldiFbank()(noise(2, samples)).shape == (2, frames, 128)


@FRONTENDS
def test_a_callers_autocast_changes_nothing(frontend: LogMel | KaldiFbank) -> None:
    want = frontend(noise(1, 5000))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frontend(noise(1, 5000)), want)


@FRONTENDS
def test_batch_equals_singles(frontend: LogMel | KaldiFbank) -> None:
    waveform = noise(3, 5000)
    together = frontend(waveform)
    for clip, row in zip(waveform, together, strict=True):
        torch.testing.assert_close(frontend(clip[None])[0], row, atol=1e-5, rtol=0)


@FRONTENDS
def test_blocks_equal_the_whole(frontend: LogMel | KaldiFbank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long recordings are worked off in blocks, whose edges must not show."""
    waveform = noise(2, 16_077)
    whole = frontend(waveform)
    for block in (1, 2, 14, 200):
        monkeypatch.setattr("hear_ssam.frontend.BLOCK", block)
        torch.testing.assert_close(frontend(waveform), whole, atol=1e-5, rtol=0)


@FRONTENDS
def test_louder_by_g_adds_2_log_g(frontend: LogMel | KaldiFbank) -> None:
    waveform = noise(1, 5000)
    soft, loud = frontend(waveform), frontend(8 * waveform)
    heard = soft > math.log(2.0**-23) + 1  # the lowest Kaldi triangles are narrower than an FFT bin and stay empty
    assert heard.float().mean() > 0.95
    torch.testing.assert_close(loud[heard], soft[heard] + 2 * math.log(8), atol=1e-3, rtol=0)


@FRONTENDS
def test_silence_is_finite(frontend: LogMel | KaldiFbank) -> None:
    silence = frontend(torch.zeros(1, 1000))
    torch.testing.assert_close(silence, torch.full_like(silence, math.log(2.0**-23)))


@pytest.mark.parametrize("frequency", [200.0, 1000.0, 5000.0])
def test_a_tone_is_loudest_in_the_band_around_it(frequency: float) -> None:
    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    width = (mel(8000) - mel(50)) / 81
    expected = (mel(frequency) - mel(50)) / width - 1
    assert abs(LogMel()(tone(frequency))[0, 10:40].mean(0).argmax().item() - expected) <= 1

    step = math.log((1 + 8000 / 700) / (1 + 20 / 700)) / 129
    expected = math.log((1 + frequency / 700) / (1 + 20 / 700)) / step - 1
    assert abs(KaldiFbank()(tone(frequency))[0].mean(0).argmax().item() - expected) <= 1


def test_kaldi_ignores_a_constant_offset() -> None:
    waveform = noise(1, 4000)
    torch.testing.assert_close(KaldiFbank()(waveform + 0.25), KaldiFbank()(waveform), atol=2e-3, rtol=0)


@FRONTENDS
def test_gradients_reach_the_waveform(frontend: LogMel | KaldiFbank) -> None:
    waveform = noise(1, 2000).requires_grad_()
    frontend(waveform).sum().backward()
    assert waveform.grad is not None and waveform.grad.isfinite().all() and waveform.grad.abs().max() > 0


@FRONTENDS
def test_no_weights_but_follows_the_module(frontend: LogMel | KaldiFbank) -> None:
    assert not frontend.state_dict()
    double = type(frontend)().double()
    assert double(noise(1, 1000).double()).dtype == torch.float64


def test_standardize_is_per_clip_and_unbiased() -> None:
    spec = standardize(noise(2, 3 * 40).view(2, 3, 40) * torch.tensor([1.0, 50.0])[:, None, None] + 7)
    for clip in spec:
        assert abs(clip.mean().item()) < 1e-5
        assert abs(clip.flatten().var(unbiased=True).item() - 1) < 1e-4
    assert standardize(torch.full((1, 2, 3), 4.0)).abs().max() == 0


def test_the_config_names_front_end_and_normalisation() -> None:
    ssam, ssamba = CONFIGS["ssam_tiny"], CONFIGS["ssamba_tiny"]
    assert isinstance(build_frontend(ssam), LogMel) and isinstance(build_frontend(ssamba), KaldiFbank)
    spec = noise(1, 12).view(1, 3, 4)
    torch.testing.assert_close(normalize(spec, ssam), standardize(spec))
    other = dataclasses.replace(ssamba, fbank_mean=-6.0, fbank_std=5.0)
    torch.testing.assert_close(normalize(spec, other), (spec + 6.0) / 10.0)


def test_logmel_equals_torchaudio() -> None:
    transforms = pytest.importorskip("torchaudio.transforms")
    theirs = transforms.MelSpectrogram(16_000, n_fft=400, hop_length=160, f_min=50.0, f_max=8000.0, n_mels=80)
    waveform = noise(2, 16_000)
    expected = torch.log(theirs(waveform) + 2.0**-23).transpose(1, 2)
    torch.testing.assert_close(LogMel()(waveform), expected, atol=2e-4, rtol=0)


def test_kaldi_equals_torchaudio() -> None:
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    waveform = noise(1, 16_000)
    expected = kaldi.fbank(
        waveform - waveform.mean(), htk_compat=True, sample_frequency=16_000, use_energy=False,
        window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10,
    )  # fmt: skip
    torch.testing.assert_close(KaldiFbank()(waveform)[0], expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("seconds", ["0.7s", "2.5s"])
def test_golden_logmel(golden: Path, seconds: str) -> None:
    with np.load(golden / "ssam_mini.npz") as file:
        spec = LogMel()(torch.from_numpy(file[f"wave_{seconds}"]))
        np.testing.assert_allclose(spec, file[f"logmel_raw_{seconds}"][:, 0], atol=2e-4, rtol=0)
        np.testing.assert_allclose(standardize(spec), file[f"logmel_{seconds}"][:, 0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("window", ["10s_T1024", "3s_T512"])
def test_golden_filterbank(golden: Path, window: str) -> None:
    with np.load(golden / "ssamba_mini.npz") as file:
        spec = KaldiFbank()(torch.from_numpy(file[f"wave_{window}"]))
        np.testing.assert_allclose(spec[0], file[f"fbank_raw_{window}"], atol=2e-3, rtol=0)
        expected = file[f"input_{window}"]
        padded = torch.nn.functional.pad(spec, (0, 0, 0, len(expected) - spec.shape[1]))  # before normalising
        np.testing.assert_allclose(normalize(padded, CONFIGS["ssamba_tiny"])[0], expected, atol=1e-3, rtol=0)
