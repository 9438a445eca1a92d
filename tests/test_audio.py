"""Reading audio: by physical properties, then every way in which a file can be bad."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hear_ssam import audio
from hear_ssam.audio import decode_audio, find_audio, read_audio, resample
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
        ".": "is a folder",
        "text.wav": "cannot be read as audio",
        "nothing.wav": "holds no samples; leave it out",
        "empty.wav": "no samples",
        "nan.wav": "NaN or infinite",
        "inf44.wav": "NaN or infinite",
        "cut.flac": "cannot be read as audio",
    }.items():
        with pytest.raises(HearSsamError, match=reason) as caught:
            read_audio(tmp_path / name, 16000)
        assert str(caught.value).startswith(str(tmp_path / name))


# --- headers that lie -------------------------------------------------------------------------------------------------

FORMATS = {  # suffix -> format, subtype, and where the size of the audio stands: after which bytes, how it is written
    "wav": ("WAV", "PCM_16", b"data", "<I"),
    "wav24": ("WAVEX", "PCM_24", b"data", "<I"),
    "adpcm": ("WAV", "IMA_ADPCM", b"data", "<I"),
    "aiff": ("AIFF", "PCM_16", b"SSND", ">I"),
    "caf": ("CAF", "PCM_16", b"data", ">Q"),
    "w64": ("W64", "PCM_16", bytes.fromhex("64617461f3acd3118cd100c04f8edb8a"), "<Q"),
    "rf64": ("RF64", "PCM_16", b"ds64\x1c\0\0\0" + struct.pack("<Q", 96096), "<Q"),
    "au": ("AU", "PCM_16", struct.pack(">4sI", b".snd", 24), ">I"),
    "sph": ("NIST", "PCM_16", b"", ""),
    "flac": ("FLAC", "PCM_16", b"", ""),
    "mp3": ("MP3", "MPEG_LAYER_III", b"", ""),
    "ogg": ("OGG", "VORBIS", b"", ""),
    "opus": ("OGG", "OPUS", b"", ""),
}
SIZED = [name for name, (*_, code) in FORMATS.items() if code]


def encoded(name: str, seed: int = 0) -> bytes:
    """Three seconds in a format."""
    buffer = io.BytesIO()
    sound = np.random.default_rng(seed).uniform(-0.5, 0.5, 48_000).astype(np.float32)
    soundfile.write(buffer, sound, 16_000, format=FORMATS[name][0], subtype=FORMATS[name][1])
    return buffer.getvalue()


def with_size(name: str, data: bytes, change: Callable[[int], int]) -> bytes:
    """The header's size of the audio changed."""
    *_, mark, code = FORMATS[name]
    at = data.index(mark) + len(mark)
    (size,) = struct.unpack_from(code, data, at)
    return data[:at] + struct.pack(code, change(size)) + data[at + struct.calcsize(code) :]


def decode(data: bytes) -> np.ndarray:
    return decode_audio(io.BytesIO(data), "it", 16_000)


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_end_early_are_said_to(name: str) -> None:
    data = encoded(name)
    for part in (0.5, 0.9):
        with pytest.raises(HearSsamError, match=r"^it: is (damaged or )?cut off.*; fetch it again"):
            decode(data[: int(part * len(data))])


@pytest.mark.parametrize("name", FORMATS)
def test_files_that_were_joined_are_read_whole(name: str) -> None:
    first, second = encoded(name), encoded(name, seed=1)
    np.testing.assert_array_equal(decode(first + second), np.concatenate([decode(first), decode(second)]))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tail", [b"TAG" + bytes(125), bytes(3000)], ids=["tag", "padding"])
def test_what_is_behind_the_audio_is_not_audio(name: str, tail: bytes) -> None:
    if name == "sph":
        pytest.skip("NIST headers count no bytes")
    np.testing.assert_array_equal(decode(encoded(name) + tail), decode(encoded(name)))


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("wav", 20 * b"LIST\x08\0\0\0INFOabcd"),
        ("wav", b"LIST\xff\xff\0\0INFO" + 100 * b"cut off"),
        ("wav", 20 * b"LIST\x08\0\0\0INFOabcd" + 100 * b"\xee\xee"),
        ("aiff", 20 * b"ANNO\0\0\0\x08annotate"),
    ],
)
def test_metadata_behind_the_audio_is_not_audio(name: str, tail: bytes) -> None:
    np.testing.assert_array_equal(decode(encoded(name) + tail), decode(encoded(name)))
    np.testing.assert_array_equal(decode(encoded(name) + tail[:80] + encoded(name))[:48_000], decode(encoded(name)))


def test_an_odd_chunk_may_lack_its_padding() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(47_999), 16_000, format="WAV", subtype="PCM_U8")
    data = buffer.getvalue()[: 44 + 47_999] + 20 * b"LIST\x08\0\0\0INFOabcd"
    assert len(decode(data)) == 47_999
    assert len(decode(data + data[: 44 + 47_999] + data)) == 3 * 47_999


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize(
    "less", [lambda size: 24 if size == 96_024 else 4, lambda size: size // 8], ids=["none", "1/8"]
)
def test_more_audio_than_the_header_counts_is_read_with_a_warning(name: str, less: Callable[[int], int]) -> None:
    data = encoded(name)
    with pytest.warns(UserWarning, match=r"^it: its header counts .* were read; write the file again"):
        read = decode(with_size(name, data, less))
    np.testing.assert_array_equal(read, decode(data))


@pytest.mark.parametrize("name", SIZED)
def test_lengths_that_a_pipe_leaves_open_mean_until_the_end(name: str) -> None:
    code = FORMATS[name][-1]
    for size in (2 ** (8 * struct.calcsize(code)) - 1, 0x7FFFF000):
        endless = with_size(name, encoded(name), lambda _, s=size: s)
        np.testing.assert_array_equal(decode(endless), decode(encoded(name)))


@pytest.mark.parametrize("count", [0, 20_000, 90_000])
def test_count_of_flac(count: int) -> None:
    whole = bytearray(encoded("flac"))
    data = bytearray(whole)
    data[21:26] = (int.from_bytes(whole[21:26], "big") >> 36 << 36 | count).to_bytes(5, "big")
    if count > 48_000:
        with pytest.raises(HearSsamError, match=r"3\.00 of 5\.62 s are there"):
            decode(bytes(data))
        return
    warns = pytest.warns(UserWarning, match=r"counts 1\.25 s, 3\.00 s are there") if count else contextlib.nullcontext()
    with warns:
        np.testing.assert_array_equal(decode(bytes(data)), decode(bytes(whole)))


def mp3_frames(data: bytes) -> list[bytes]:
    """MPEG 2 layer III at 16 kHz, as `encoded` writes it."""
    frames = []
    while data:
        kbps = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[data[2] >> 4]
        length = 72 * kbps * 1000 // 16_000 + (data[2] >> 1 & 1)
        frames.append(data[:length])
        data = data[length:]
    return frames


def test_mp3_without_or_with_a_wrong_count_of_frames() -> None:
    sound = np.random.default_rng(0).standard_normal(48_000) * np.repeat([1e-4, 0.3], 24_000)  # bit rates differ
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, 16_000, format="MP3", compression_level=0.9, bitrate_mode="VARIABLE")
    counter, *frames = mp3_frames(buffer.getvalue())
    assert b"Xing" in counter and len({len(frame) for frame in frames}) > 2
    assert len(decode(b"".join(frames))) == 576 * len(frames)  # nothing tells how much only fills up
    assert len(decode(b"".join(frames) + 100 * b"\xff\0tail")) == 576 * len(frames)
    at = counter.index(b"Xing") + 8
    small = counter[:at] + (len(frames) // 3).to_bytes(4, "big") + counter[at + 4 :]
    with pytest.warns(UserWarning, match=f"counts {len(frames) // 3} frames, {len(frames)} are there and were read"):
        assert abs(len(decode(small + b"".join(frames))) - 48_000) < 1200


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_equal_one_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    whole = decode(encoded(name))
    monkeypatch.setattr(audio, "BLOCK", 5000)
    np.testing.assert_array_equal(decode(encoded(name)), whole)


def test_streams_in_one_file_may_differ_in_rate_and_channels() -> None:
    other = io.BytesIO()
    soundfile.write(other, np.stack([tone(44_100)] * 2, axis=1), 44_100, format="OGG", subtype="VORBIS")
    assert len(decode(encoded("ogg") + other.getvalue())) == 64_000
    with pytest.raises(HearSsamError, match="cut off"):
        decode(encoded("ogg")[:9000] + other.getvalue())


@pytest.mark.parametrize("rate", [0, 1, 999, 2**31 - 1])
def test_an_impossible_rate_is_named(rate: int) -> None:
    data = encoded("wav")
    with pytest.raises(HearSsamError, match=f"^it: .*sample rate of {rate:,} Hz"):
        decode(data[:24] + struct.pack("<I", rate) + data[28:])


def test_shared_cases(shared: Path) -> None:
    cases = shared / "cases"
    if not cases.is_dir():
        pytest.skip(f"no cases at {cases}")

    def read(name: str) -> np.ndarray:
        return read_audio(cases / name, 16_000)

    assert len(read("vbr_noxing.mp3")) / 16_000 == pytest.approx(3.1, abs=0.01)
    assert len(read("flac_unknownlen.flac")) == 48_000
    for name in ("hdr_zero.wav", "hdr_small.wav"):
        with pytest.warns(UserWarning, match=name):
            assert len(read(name)) == 48_000
    for name in ("trunc_half.wav", "trunc.mp3", "trunc.ogg"):
        with pytest.raises(HearSsamError, match=rf"{name}: is cut off"):
            read(name)
    once = soundfile.read(cases / "vbr.mp3", dtype="float32")[0]
    np.testing.assert_array_equal(read_audio(cases / "vbr.mp3", 44_100), once)


# --- files and folders ------------------------------------------------------------------------------------------------


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()


def test_find_audio_keeps_files_and_opens_folders(tmp_path: Path) -> None:
    make(tmp_path, "b.wav", "a.FLAC", "sub/c.mp3", "sub/.d.wav", ".hidden/e.wav", "notes.txt")
    named = tmp_path / "notes.txt"
    expected = [named, *(tmp_path / name for name in ("a.FLAC", "b.wav", "sub/c.mp3"))]
    with pytest.warns(UserWarning, match=r"left out 1 \.txt;"):
        assert find_audio([named, tmp_path]) == expected


def test_find_audio_counts_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # not installed
    make(tmp_path, "in/a.wav", "in/b.M4A", "in/c.m4a", "in/d.wma", "in/LICENSE", "out/f.wav")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    with pytest.warns(UserWarning, match=r"in: left out 2 \.m4a, 1 \.wma, 1 linked folders, 1 without a suffix;"):
        assert find_audio([tmp_path / "in"]) == [tmp_path / "in" / "a.wav"]
    with pytest.raises(HearSsamError, match=rf"^{tmp_path}/in/link: no audio files.*1 \.m4a"):
        (tmp_path / "out" / "f.wav").rename(tmp_path / "out" / "f.m4a")
        find_audio([tmp_path / "in" / "link"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_not_opened(tmp_path: Path) -> None:
    make(tmp_path, "a.wav")
    os.mkfifo(tmp_path / "x.wav")
    with pytest.warns(UserWarning, match="left out 1 pipes and devices"):
        assert find_audio([tmp_path]) == [tmp_path / "a.wav"]
    with pytest.raises(HearSsamError, match=r"x\.wav: is a folder, a pipe or a device"):
        read_audio(tmp_path / "x.wav", 16_000)


def test_find_audio_refuses_folders_without_audio(tmp_path: Path) -> None:
    with pytest.raises(HearSsamError, match=f"^{tmp_path}: no audio files"):
        find_audio([tmp_path])


def test_find_audio_reports_a_folder_it_cannot_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.wav").touch()
    monkeypatch.setattr("os.scandir", deny)  # file modes do not stop root
    with pytest.raises(HearSsamError, match=rf"^{tmp_path}: cannot be listed: Permission denied"):
        find_audio([tmp_path])
