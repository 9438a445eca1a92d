"""Reading audio: by physical properties, then every way in which a file can be bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from hear_ssam import audio
from hear_ssam.audio import find_audio, read_audio, resample
from hear_ssam.errors import HearSsamError


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_a_tone_stays_the_same_tone_at_any_rate(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "tone.wav", tone(rate), rate, subtype="FLOAT")
    read = read_audio(tmp_path / "tone.wav", 16000)
    assert read.dtype == np.float32 and read.shape == (16000,)
    np.testing.assert_allclose(read[1000:-1000], tone(16000)[1000:-1000], atol=1e-4)


def test_what_the_lower_rate_cannot_hold_is_removed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "high.wav", tone(48000, hertz=15000), 48000, subtype="FLOAT")
    assert np.abs(read_audio(tmp_path / "high.wav", 16000)[1000:-1000]).max() < 1e-4


@pytest.mark.parametrize("rate", [16000, 44100])
def test_channels_are_averaged(tmp_path: Path, rate: int) -> None:
    channels = np.stack([tone(rate), 0.5 * tone(rate), np.zeros(rate, np.float32)], axis=1)
    soundfile.write(tmp_path / "three.wav", channels, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", channels.mean(axis=1), rate, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "three.wav", 16000), read_audio(tmp_path / "mono.wav", 16000))


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".aiff"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    soundfile.write(tmp_path / f"tone{suffix}", tone(16000), 16000)
    read = read_audio(tmp_path / f"tone{suffix}", 16000)
    assert abs(len(read) - 16000) < 2500  # mp3 pads
    assert np.sqrt(np.mean(read[4000:12000] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_reading_in_blocks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, rate * 2).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", noise, rate, subtype="FLOAT")
    whole = resample(noise, rate, 16000)
    for block in (rate * 2, 1000, 4096):  # the first divides the length: the last block is empty
        monkeypatch.setattr(audio, "BLOCK", block)
        read = read_audio(tmp_path / "noise.wav", 16000)
        assert read.shape == whole.shape
        np.testing.assert_allclose(read, whole, atol=1e-6)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not audio at all")
    (tmp_path / "nothing.wav").touch()
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan], np.float32), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "inf44.wav", np.full(44100, np.inf, np.float32), 44100, subtype="FLOAT")
    soundfile.write(tmp_path / "cut.flac", np.random.default_rng(0).uniform(-1, 1, 16000), 16000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:30])
    for name, reason in {
        "absent.wav": "No such file",
        ".": "Is a directory",
        "text.wav": "cannot be read as audio",
        "nothing.wav": "cannot be read as audio",
        "empty.wav": "no samples",
        "nan.wav": "NaN or infinite",
        "inf44.wav": "NaN or infinite",
        "cut.flac": "cannot be read as audio",
    }.items():
        with pytest.raises(HearSsamError, match=reason) as caught:
            read_audio(tmp_path / name, 16000)
        assert str(caught.value).startswith(str(tmp_path / name))


def test_find_audio_keeps_files_and_opens_folders(tmp_path: Path) -> None:
    for name in ("b.wav", "a.FLAC", "sub/c.mp3", "sub/.d.wav", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    named = tmp_path / "notes.txt"
    expected = [named, *(tmp_path / name for name in ("a.FLAC", "b.wav", "sub/c.mp3"))]
    assert find_audio([named, tmp_path]) == expected


def test_find_audio_refuses_folders_without_audio(tmp_path: Path) -> None:
    with pytest.raises(HearSsamError, match=f"no audio files below {tmp_path}"):
        find_audio([tmp_path])


def test_find_audio_reports_a_folder_it_cannot_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.wav").touch()
    monkeypatch.setattr("os.scandir", deny)  # file modes do not stop root
    with pytest.raises(HearSsamError, match=r"cannot list the folder .*Permission denied"):
        find_audio([tmp_path])
