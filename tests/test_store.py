"""The store of 16 kHz audio, and the spectrogram frames that are computed from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hear_ssam.audio import Clip
from hear_ssam.config import CONFIGS
from hear_ssam.errors import HearSsamError
from hear_ssam.frontend import build_frontend
from hear_ssam.pretraining.store import Frames, Store, build_store, open_store

LENGTHS = (16_000, 400, 401, 7_777, 32_160, 560)


@pytest.fixture()
def audio() -> list[np.ndarray]:
    """Clips on the grid of 16 bits."""
    rng = np.random.default_rng(0)
    return [(rng.integers(-3000, 3000, n) / 32768).astype(np.float32) for n in LENGTHS]


@pytest.fixture()
def store(tmp_path: Path, audio: list[np.ndarray]) -> Store:
    clips = (Clip("odd" if i % 2 else "even", f"clip {i}", lambda a=a: a) for i, a in enumerate(audio))
    build_store(tmp_path / "store", clips, terms={name: {"licence": f"terms of {name}"} for name in ("even", "odd")})
    return open_store(tmp_path / "store")


def test_store_holds_every_sample(store: Store, audio: list[np.ndarray]) -> None:
    assert len(store) == len(audio) and store.holds_audio
    for i, clip in enumerate(audio):
        assert store[i].dtype == np.int16
        np.testing.assert_array_equal(store[i] / np.float32(32768), clip)
        assert store.name(i) == f"clip {i}"
    assert store.hours == sum(LENGTHS) / 16_000 / 3600
    assert store.source.tolist() == [0, 1, 0, 1, 0, 1]
    rows = store.info["sources"]
    assert [(row["name"], row["clips"], row["licence"]) for row in rows] == [
        ("even", 3, "terms of even"),
        ("odd", 3, "terms of odd"),
    ]
    assert store.digest == hashlib.sha256((store.folder / "audio.s16").read_bytes()).hexdigest()
    assert rows[1]["sha256"] == hashlib.sha256(b"".join(store[i].tobytes() for i in (1, 3, 5))).hexdigest()


def test_loud_samples_are_clipped_and_not_wrapped(tmp_path: Path) -> None:
    loud = np.linspace(-1.5, 1.5, 1000, dtype=np.float32)
    build_store(tmp_path / "s", [Clip("s", "loud", lambda: loud)])
    clip = open_store(tmp_path / "s")[0]
    assert clip[0] == -32768 and clip[-1] == 32767 and (np.diff(clip.astype(int)) >= 0).all()


@pytest.mark.parametrize("model", ["ssam_tiny", "ssamba_tiny"])
def test_frames_are_those_of_the_whole_clip(store: Store, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[model]
    frames, front_end = Frames(store, config, torch.device("cpu")), build_frontend(config)
    whole = [front_end(torch.from_numpy(store[i] / np.float32(32768))[None])[0] for i in range(len(store))]
    assert frames.lengths.tolist() == [len(spec) for spec in whole]
    clip = torch.tensor([0, 1, 2, 3, 4, 5, 4])
    position = (torch.randint(0, 10_000, (7, 50)) + torch.arange(50)) % frames.lengths[clip][:, None]  # any order
    position[:, 0], position[:, 1] = 0, frames.lengths[clip] - 1
    want = torch.stack([whole[c][p] for c, p in zip(clip.tolist(), position, strict=True)])
    torch.testing.assert_close(frames(clip, position), want, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("hear_ssam.pretraining.store.BLOCK", 100)  # two clips at a time
    torch.testing.assert_close(frames(clip, position), want, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # measuring is never rounded
        torch.testing.assert_close(frames(clip, position), want, rtol=1e-4, atol=1e-4)
    frames.compute()  # all at once, as on a GPU
    assert frames.data.shape == (sum(map(len, whole)), config.n_mels)
    torch.testing.assert_close(frames(clip, position), want, rtol=1e-4, atol=1e-4)


def log_mel_store(folder: Path) -> np.ndarray:
    """A store as version 0.1 wrote it."""
    folder.mkdir()
    frames = np.random.default_rng(1).standard_normal((50, 80)).astype(np.float16)
    frames.tofile(folder / "frames.f16")
    np.savez(folder / "clips.npz", offsets=np.array([0, 20, 50]), source=np.array([0, 0], np.int32))
    (folder / "store.json").write_text(json.dumps({"frames": 50, "clips": 2, "sources": []}))
    return frames


def test_stores_of_log_mel_frames_are_still_read(tmp_path: Path) -> None:
    data = log_mel_store(tmp_path / "old")
    store = open_store(tmp_path / "old")
    frames = Frames(store, CONFIGS["ssam_tiny"], torch.device("cpu"))
    assert not store.holds_audio and frames.lengths.tolist() == [20, 30] and store.hours == 50 / 360_000
    got = frames(torch.tensor([1, 0]), torch.tensor([[29, 0, 3], [1, 1, 19]]))
    np.testing.assert_array_equal(got.numpy(), data[[[49, 20, 23], [1, 1, 19]]].astype(np.float32))
    assert store.digest == hashlib.sha256(data.tobytes()).hexdigest() and store.name(1) == "clip 1"
    with pytest.raises(HearSsamError, match=rf"^{tmp_path / 'old'}: holds log-mel frames, not what ssamba reads"):
        Frames(store, CONFIGS["ssamba_tiny"], torch.device("cpu"))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(HearSsamError, match=r"clips\.npz: cannot be written: No space left"):
        build_store(tmp_path / "s", [Clip("s", "a", lambda: np.ones(999, np.float32) * np.arange(999) / 999)])
    with pytest.raises(HearSsamError, match="no finished store"):
        open_store(tmp_path / "s")


def test_a_defect_spoils_one_clip_only(tmp_path: Path) -> None:
    def broken() -> np.ndarray:
        raise RuntimeError("a defect")

    clips = [Clip("s", "a", lambda: np.linspace(-0.5, 0.5, 16_000)), Clip("s", "b", broken)]
    info = build_store(tmp_path / "store", clips)
    assert info["clips"] == 1 and info["skipped"][0].startswith("b: RuntimeError: a defect; ")
