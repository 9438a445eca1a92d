"""Whitened scene embeddings: what the map does, that every way to a scene takes it, and the script that fits it."""

from __future__ import annotations

import dataclasses
import functools
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hear_ssam import embed, load_model
from hear_ssam.audio import Clip
from hear_ssam.checkpoint import load_checkpoint, save_checkpoint
from hear_ssam.config import build_config
from hear_ssam.embedding.clips import embed_long
from hear_ssam.encoder import Encoder
from hear_ssam.paths import shipped
from hear_ssam.pretraining.loop import _start_from
from hear_ssam.pretraining.recipe import Recipe
from hear_ssam.pretraining.store import build_store

script: dict[str, Any] = runpy.run_path(str(shipped("checkpoints") / "whitening.py"))
PLAIN = build_config("ssam", 48, depth=2, pooling="mean_std", readout_block=1)


@pytest.fixture()
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The same weights without and with a whitening."""
    torch.manual_seed(0)
    state = Encoder(PLAIN).state_dict()
    save_checkpoint(tmp_path / "plain.safetensors", PLAIN, state, {"licence": "CC0"})
    state |= {"whitening.center": torch.randn(2, 5, 48), "whitening.maps": torch.randn(2, 48, 48)}
    save_checkpoint(tmp_path / "white.safetensors", dataclasses.replace(PLAIN, whitening=True), state, {})
    return tmp_path / "plain.safetensors", tmp_path / "white.safetensors"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 10


def whitened(scenes: np.ndarray, file: Path) -> np.ndarray:
    """By hand, band by band."""
    state, want = load_checkpoint(file)[1], scenes.reshape(len(scenes), 2, 5, 48).copy()
    for part in range(2):
        for band in range(5):
            centred = want[:, part, band] - state["whitening.center"][part, band].numpy()
            want[:, part, band] = centred @ state["whitening.maps"][part].numpy()
    return want.reshape(len(scenes), 480)


def test_every_way_to_a_scene_takes_the_map(files: tuple[Path, Path]) -> None:
    plain, white = files
    audio, model = noise(3, 40_000), load_model(white)
    want = whitened(embed(audio, plain), white)
    close = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-4)
    close(embed(audio, white), want)
    scene, rows = model.scene_and_rows(audio)
    close(scene.detach(), want)
    close(embed(audio, white, pooling="mean"), want[:, :240])
    close(embed(audio, load_model(white, pooling="mean")), want[:, :240])
    assert load_model(white, pooling="mean").scene_embedding_size == 240
    long = embed_long(model, lambda: iter([audio[0].numpy()]))[0]
    close(long.numpy(), want[0])
    # what is no scene of this block in this order stays as it is
    assert torch.equal(rows, load_model(plain)(audio))
    assert np.array_equal(embed(audio, white, layers=[1]), embed(audio, plain, layers=[1]))
    assert np.array_equal(embed(audio, white, layers=[1]), embed(audio, plain))
    raw = embed_long(model, lambda: iter([audio[0].numpy()]), layers=[1])[0]
    close(raw.numpy(), embed(audio[:1], plain)[0])
    official = [embed(audio, load_model(file, token_order="official")) for file in files]
    assert np.array_equal(*official)
    model.save_pretrained(white.parent / "folder")
    close(embed(audio, white.parent / "folder"), want)


def test_inside_autocast_scenes_stay_float32(files: tuple[Path, Path]) -> None:
    model = load_model(files[1])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rows = model(noise(2, 40_000))
        scene = model.scene(rows, rows)
    assert scene.dtype == torch.float32
    np.testing.assert_allclose(
        scene, whitened(load_model(files[0]).scene(rows, rows).numpy(), files[1]), rtol=1e-4, atol=1e-4
    )


def test_ssamba_has_one_map_for_its_bands_in_either_order(tmp_path: Path) -> None:
    config = build_config("ssamba", 48, depth=2, window_frames=64, pooling="mean_std", whitening=True)
    state = Encoder(config).state_dict()
    state["whitening.maps"] = 2 * state["whitening.maps"]
    save_checkpoint(tmp_path / "s.safetensors", config, state, {})
    audio, model = noise(2, 20_000), load_model(tmp_path / "s.safetensors")
    pooled = embed(audio, model, layers=[2])
    np.testing.assert_allclose(embed(audio, model), 2 * pooled, atol=1e-5)
    official = load_model(tmp_path / "s.safetensors", token_order="official")
    assert embed(audio, official).shape == (2, 96)


def test_a_new_one_changes_nothing_and_a_clip_is_whitened_alone() -> None:
    encoder = Encoder(dataclasses.replace(PLAIN, whitening=True))
    pooled = noise(4, 480)
    assert_close(encoder.whitening(pooled), pooled, rtol=0, atol=0)
    assert {name for name in encoder.state_dict() if "whitening" in name} == {"whitening.center", "whitening.maps"}
    assert not [name for name, _ in encoder.named_parameters() if "whitening" in name]  # nothing that is trained


def test_a_new_one_is_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        state = Encoder(dataclasses.replace(PLAIN, whitening=True)).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_the_map_is_not_copied_for_every_clip() -> None:
    encoder, kept = Encoder(dataclasses.replace(PLAIN, whitening=True)), list[int]()
    pooled = noise(64, 480).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        encoder.whitening(pooled)
    assert max(kept) <= pooled.numel()


def test_training_starts_from_whitened_weights_without_their_map(files: tuple[Path, Path]) -> None:
    encoder = Encoder(dataclasses.replace(PLAIN, readout_block=0))
    _start_from(Recipe(init=str(files[1])), encoder)
    assert torch.equal(encoder.state_dict()["patch_embed.weight"], load_checkpoint(files[1])[1]["patch_embed.weight"])


def test_a_state_dict_that_names_no_block_is_not_whitened(files: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save(load_model(files[1]).state_dict(), tmp_path / "mine.pt")
    with pytest.warns(UserWarning, match="holds no config"):
        config, state, _ = load_checkpoint(tmp_path / "mine.pt")
    assert not config.whitening and not [name for name in state if "whitening" in name]


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_the_script_fits_it(files: tuple[Path, Path], tmp_path: Path, power: float) -> None:
    """Half the power leaves the root of every variance; the full one leaves them all equal, without correlation."""
    clips = [noise(4_000 + 100 * i, seed=i).numpy() * (1 + i % 7) for i in range(90)]
    build_store(tmp_path / "store", (Clip("a", f"{i}", lambda x=x: x) for i, x in enumerate(clips)), workers=1)
    drawn = script["draw"](script["open_store"](tmp_path / "store"), 60, 0.2)
    assert {len(x) for x in drawn} == {3_200} and len({x.tobytes() for x in drawn}) > 50
    script["fit"](str(files[0]), drawn, str(tmp_path / "out.safetensors"), None, power)
    plain, white = (embed(drawn, file).reshape(60, 2, 5, 48) for file in (files[0], tmp_path / "out.safetensors"))
    assert np.abs(white.mean(0)).max() < 1e-2
    for part in range(2):
        before, after = (np.cov((x - x.mean(0))[:, part].reshape(-1, 48).T, bias=True) for x in (plain, white))
        assert np.trace(after) / 48 == pytest.approx(1, abs=1e-2)
        values, vectors = np.linalg.eigh(before)
        kept = values / values.mean() > 1e-4
        found = np.diag(vectors.T @ after @ vectors)[kept]
        want = values[kept] ** (1 - 2 * power)
        np.testing.assert_allclose(found / found.mean(), want / want.mean(), rtol=0.05)
    config, _, info = load_checkpoint(tmp_path / "out.safetensors")
    assert config == dataclasses.replace(PLAIN, whitening=True) and info["licence"] == "CC0"


def test_the_script_by_its_command(files: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    clips = (Clip("a", f"{i}", lambda i=i: noise(9_000, seed=i).numpy()) for i in range(70))
    build_store(tmp_path / "store", clips, workers=1)
    command = [str(tmp_path / "store"), str(files[1]), "-o", str(tmp_path / "out.safetensors"), "--clips", "8"]
    assert script["main"]([*command, "--block", "2"]) == 0
    config = load_checkpoint(tmp_path / "out.safetensors")[0]
    assert config == dataclasses.replace(PLAIN, whitening=True, readout_block=2)
    assert script["main"]([str(tmp_path / "none"), *command[1:]]) == 2
    assert "none" in capsys.readouterr().err
