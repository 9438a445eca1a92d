"""The leak check: recordings are recognised re-encoded, cut, quieter and under others; different ones are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
import torch

from hear_ssam.audio import Clip
from hear_ssam.cli import main
from hear_ssam.config import CONFIGS
from hear_ssam.errors import HearSsamError
from hear_ssam.pretraining import leaks
from hear_ssam.pretraining.leaks import find_leaks, landmarks
from hear_ssam.pretraining.recipe import Recipe
from hear_ssam.pretraining.store import Store, build_store, open_store
from hear_ssam.pretraining.windows import WindowSampler

RATE = 16_000


def sound(seed: int, seconds: float = 4.0) -> np.ndarray:
    """Short tones and bursts of noise at random moments: no two seeds share one."""
    rng = np.random.default_rng(seed)
    audio = rng.normal(0, 1e-3, int(seconds * RATE))
    for _ in range(int(12 * seconds)):
        length = int(rng.integers(600, 5000))
        start = int(rng.integers(0, len(audio) - length))
        time = np.arange(length) / RATE
        tone = np.sin(2 * np.pi * rng.uniform(150, 6000) * time * (1 + rng.uniform(-0.1, 0.1) * time))
        audio[start : start + length] += rng.uniform(0.05, 0.3) * np.hanning(length) * tone
    return audio.astype(np.float32)


def coded(audio: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    soundfile.write(file, audio, RATE, format="OGG", subtype="VORBIS")
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


CHANGES = {
    "cut": lambda x: x[11_111:43_210],
    "quieter": lambda x: 0.05 * x,
    "coded": coded,
    "mixed": lambda x: x + 0.7 * sound(999, len(x) / RATE),
    "all": lambda x: 0.3 * coded(x[7_777:50_000] + 0.3 * sound(998, 42_223 / RATE)),
}


@pytest.fixture(scope="module")
def known():
    return [Clip("task", f"known{i}", lambda i=i: sound(i)) for i in range(20)]


@pytest.mark.parametrize("change", CHANGES)
def test_altered_recordings_are_found_and_named(tmp_path, known, change):
    altered = [Clip("s", f"altered{i}", lambda i=i: CHANGES[change](sound(i))) for i in range(0, 20, 2)]
    others = [Clip("s", f"other{i}", lambda i=i: sound(100 + i)) for i in range(20)]
    build_store(tmp_path / "store", [*altered, *others], workers=1)
    listed = find_leaks(open_store(tmp_path / "store"), known)
    assert [leak.clip for leak in listed] == list(range(10))  # all of them, and no other
    assert [leak.known for leak in listed] == [f"known{i}" for i in range(0, 20, 2)]


def noisy(seed: int, audio: np.ndarray) -> np.ndarray:
    return (audio + np.random.default_rng(seed).normal(0, 0.01, len(audio))).astype(np.float32)


def clips_of(audio: dict[str, np.ndarray]) -> list[Clip]:
    return [Clip("s", name, lambda x=x: x) for name, x in audio.items()]


def found(tmp_path, clips: dict[str, np.ndarray], known: dict[str, np.ndarray], **options) -> dict[str, str]:
    """Name of a clip → name of the known clip that it is a copy of."""
    if not (tmp_path / "store").exists():
        build_store(tmp_path / "store", clips_of(clips))
    store = open_store(tmp_path / "store")
    return {store.name(leak.clip): leak.known for leak in find_leaks(store, clips_of(known), **options)}


def test_a_copy_is_recognised_wherever_it_was_cut(tmp_path):
    """Between the frames of the original (256 samples apart) hardly worse than on one."""
    build_store(tmp_path / "store", clips_of({str(late): sound(1)[10_240 + late :] for late in (0, 64, 128, 192)}))
    votes = [leak.votes for leak in find_leaks(open_store(tmp_path / "store"), clips_of({"known": sound(1)}))]
    assert len(votes) == 4 and min(votes) > max(votes) / 2


def test_steady_sounds_alike_are_no_leaks(tmp_path):
    time = np.arange(4 * RATE) / RATE
    hums = {f"{f} Hz": 0.3 * np.sin(2 * np.pi * f * time) for f in (50, 440, 440.5, 3000)}
    hums |= {f"noise {i}": np.random.default_rng(i).normal(0, 0.1, 4 * RATE).astype(np.float32) for i in range(4)}
    assert not found(tmp_path, {name: noisy(5, x[::-1]) for name, x in hums.items()}, hums)


def test_a_piece_of_a_long_clip_in_a_long_clip(tmp_path):
    long, known = sound(1, 65), sound(2, 63)
    long[61 * RATE : 64 * RATE] = known[1234 : 1234 + 3 * RATE]
    assert found(tmp_path, {"long": long}, {"known": known}) == {"long": "known"}


def test_little_in_common_counts_in_a_short_clip_and_not_among_much_else(tmp_path):
    """Long clips have so many peaks that some agree by chance: a twentieth of the shorter clip's must, 30 at most."""
    known, piece = sound(2, 30), sound(2, 30)[5 * RATE : 5 * RATE + 18_000]
    long = sound(1, 30)
    long[10 * RATE : 10 * RATE + len(piece)] = piece
    assert found(tmp_path, {"short": piece, "long": long}, {"known": known}) == {"short": "known"}
    assert found(tmp_path, {}, {"known": piece}) == {"short": "known", "long": "known"}


@pytest.mark.parametrize("size", [0, 1, 100, 1023, 2000])
def test_clips_too_short_for_peaks(tmp_path, size):
    assert not found(tmp_path, {"a": sound(1), "short": sound(1)[:500]}, {"short": np.ones(size, np.float32)})


def test_memory_is_bounded_by_blocks_that_change_nothing(tmp_path, monkeypatch):
    known = {f"known {i}": sound(i) for i in range(6)}
    copies = {f"copy {i}": coded(sound(i)) for i in range(6)}
    whole = found(tmp_path, copies, known, workers=2)
    assert whole == {f"copy {i}": f"known {i}" for i in range(6)}
    sizes, init = [], leaks._Index.__init__

    def counted(self, names, marks):
        init(self, names, marks)
        sizes.append(len(self.what))

    monkeypatch.setattr(leaks._Index, "__init__", counted)
    monkeypatch.setattr(leaks, "BLOCK", 800)
    assert found(tmp_path, copies, known) == whole
    assert 1 < len(sizes) < 6 and max(sizes) < 2 * 800


def test_the_command_leaves_them_out_of_training(tmp_path, capsys):
    names = ("train/a", 1), ("train/b\nc", 2), ("train/d", 3), ("tasks/x\n", 2), ("other/y", 3)
    for name, seed in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with open(tmp_path / f"{name}.wav", "wb") as file:
            soundfile.write(file, sound(seed), RATE, format="WAV")
    store, tasks = tmp_path / "store", tmp_path / "tasks"
    assert main(["corpus", str(store), "--audio", str(tmp_path / "train")]) == 0
    assert main(["corpus", str(store), "--check-against", str(tasks)]) == 0
    assert "sounds like" in capsys.readouterr().out
    opened = open_store(store)
    assert list(opened.left_out) == [1] and "b" in opened.name(1)
    assert main(["corpus", str(store), "--check-against", str(tmp_path / "other")]) == 0  # what was found before stays
    assert "2 of 3 clips are left out" in capsys.readouterr().out
    assert list(opened.left_out) == [1, 2]
    opened.leave_out([(2, "a name that is no UTF-8: \udce9", 9)])
    assert r"\udce9" in opened.left_out[2]
    with pytest.raises(HearSsamError, match="too few"):  # a is held out, b left out
        WindowSampler(opened, Recipe(), CONFIGS["ssam_tiny"], torch.device("cpu"))
    assert main(["corpus", str(store)]) == 2 and "--check-against" in capsys.readouterr().err
    (store / "store.json").unlink()
    assert main(["corpus", str(store), "--audio", str(tmp_path / "train")]) == 0 and not open_store(store).left_out
    for lines in ("clip name", "0\n7\tof another store"):
        (store / "left-out.tsv").write_text(lines)
        with pytest.raises(HearSsamError, match=r"left-out\.tsv: not the clips of this store; delete it"):
            WindowSampler(opened, Recipe(), CONFIGS["ssam_tiny"], torch.device("cpu"))


def test_what_cannot_be_checked_is_said(tmp_path, known):
    frames = Store(np.zeros((100, 80), np.float16), np.array([0, 100]), np.array([0]), {}, tmp_path)
    with pytest.raises(HearSsamError, match="holds log-mel frames"):
        find_leaks(frames, known)
    build_store(tmp_path / "store", known[:1])
    with pytest.raises(HearSsamError, match="holds no audio"):
        find_leaks(open_store(tmp_path / "store"), [])
    assert len(landmarks(np.zeros(100, np.float32))[0]) == 0  # silence has no peaks
