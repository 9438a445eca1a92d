"""Pre-training: what is drawn, that it learns, that an interrupted run goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from hear_ssam import checkpoint, config, pretrain
from hear_ssam.cli import main
from hear_ssam.corpus import Store, open_store
from hear_ssam.errors import HearSsamError
from hear_ssam.pretrain import SILENCE, Recipe, Windows

SMALL = Recipe(steps=3, batch_size=2, min_frames=200, max_frames=260)


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch):
    """The named encoder, but narrow and shallow: these tests are about the loop."""
    monkeypatch.setitem(config.CONFIGS, "ssam_tiny", config.build_config("ssam", 32, depth=2))


@pytest.fixture()
def store(tmp_path):
    """Four sources, each with a steady spectrum of its own under a little noise; clips of 30 to 900 frames."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(30, 900, 200)
    source = rng.integers(0, 4, 200)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    frames = np.sin(np.repeat(source, lengths)[:, None] + np.arange(80) / 6) + rng.normal(0, 0.1, (offsets[-1], 80))
    folder = tmp_path / "store"
    folder.mkdir()
    frames.astype(np.float16).tofile(folder / "frames.f16")
    np.savez(folder / "clips.npz", offsets=offsets, source=source.astype(np.int32))
    rows = [{"name": f"source{i}", "clips": 1, "hours": 1.0, "licence": "CC0", "attribution": "me"} for i in range(4)]
    (folder / "store.json").write_text(json.dumps({"frames": int(offsets[-1]), "clips": 200, "sources": rows}))
    return folder


def test_windows_are_standardised_and_repeatable(store):
    windows = Windows(open_store(store), dataclasses.replace(SMALL, max_frames=200), 200, torch.device("cpu"))
    spec = windows.draw(8, torch.Generator().manual_seed(0))
    assert spec.shape == (8, 200, 80) and spec.dtype == torch.float32
    assert spec.mean((1, 2)).abs().max() < 1e-4
    torch.testing.assert_close(spec.std((1, 2)), torch.ones(8), rtol=1e-3, atol=1e-3)
    again = windows.draw(8, torch.Generator().manual_seed(0))
    assert torch.equal(spec, again)


def test_held_out_clips_are_never_trained_on(store):
    opened = open_store(store)
    train = Windows(opened, SMALL, 200, torch.device("cpu"))
    check = Windows(opened, SMALL, 200, torch.device("cpu"), held_out=True)
    assert not ((train.weights > 0) & (check.weights > 0)).any()
    assert ((train.weights > 0) | (check.weights > 0)).all()


def test_short_clips_are_repeated_or_padded_with_silence(monkeypatch):
    clip = np.linspace(-3, 0, 50, dtype=np.float16)[:, None].repeat(80, 1)
    store = Store(np.concatenate([clip, clip]), np.array([0, 50, 100]), np.array([0, 0]), {})
    monkeypatch.setattr("hear_ssam.frontend.standardize", lambda spec: spec)
    for pad in (0.0, 1.0):
        recipe = Recipe(min_frames=200, max_frames=200, mix=0, pad=pad)
        spec = Windows(store, recipe, 200, torch.device("cpu")).draw(1, torch.Generator().manual_seed(0))[0, :, 0]
        assert torch.equal(spec[:50], torch.from_numpy(clip[:, 0]).float())
        want = torch.full((150,), SILENCE) if pad else spec[:50].repeat(3)
        torch.testing.assert_close(spec[50:], want)


def test_training_lowers_the_loss_and_writes_a_loadable_checkpoint(store, tmp_path):
    recipe = dataclasses.replace(SMALL, steps=25, batch_size=8, learning_rate=3e-3)
    untrained = pretrain.pretrain(store, tmp_path / "start", dataclasses.replace(recipe, steps=1))
    path = pretrain.pretrain(store, tmp_path / "run", recipe)
    loss = [checkpoint.load_checkpoint(p)[2]["training"]["held_out_loss"] for p in (untrained, path)]
    assert loss[1] < 0.8 * loss[0]
    card = path.with_suffix(".md").read_text()
    assert "| source2 | 1 | 1.00 | CC0 | me |" in card and "200 windows" in card
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert log[0] == "step,loss,held_out_loss,seconds" and log[-1].startswith("25,")


def test_an_interrupted_run_ends_with_the_same_weights(store, tmp_path, monkeypatch):
    recipe = dataclasses.replace(SMALL, steps=6)
    whole = pretrain.pretrain(store, tmp_path / "whole", recipe)
    draw, calls = Windows.draw, []

    def interrupted(self, batch, generator):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw(self, batch, generator)

    monkeypatch.setattr(Windows, "draw", interrupted)
    assert main(["pretrain", str(store), str(tmp_path / "run"), *options(recipe)]) == 130
    monkeypatch.setattr(Windows, "draw", draw)
    assert main(["pretrain", str(store), str(tmp_path / "run"), *options(recipe)]) == 0
    assert len(calls) == 4
    _, want, _ = checkpoint.load_checkpoint(whole)
    _, got, _ = checkpoint.load_checkpoint(tmp_path / "run" / "ssam_tiny.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)
    with pytest.raises(HearSsamError, match="holds a run with steps=6"):
        pretrain.pretrain(store, tmp_path / "run", dataclasses.replace(recipe, steps=7))


def test_a_run_can_start_from_the_weights_of_another(store, tmp_path):
    first = pretrain.pretrain(store, tmp_path / "first", dataclasses.replace(SMALL, steps=20, learning_rate=3e-3))
    again = dataclasses.replace(SMALL, steps=1, learning_rate=1e-9, init=str(first))
    path = pretrain.pretrain(store, tmp_path / "again", again)
    (_, old, told), (_, new, info) = checkpoint.load_checkpoint(first), checkpoint.load_checkpoint(path)
    assert all(torch.allclose(new[name], old[name], rtol=2e-3, atol=1e-4) for name in old)  # half precision, 1 step
    assert info["training"]["init"]["sha256"] == told["sha256"]
    assert info["training"]["recipe"]["init"] == first.name  # where it lay is nobody's business
    card = path.with_suffix(".md").read_text()
    assert card.index("--steps 20") < card.index(told["sha256"]) < card.rindex("--steps 1")
    with pytest.raises(HearSsamError, match=r"width 32.* do not fit ssam_small"):
        pretrain.pretrain(store, tmp_path / "other", dataclasses.replace(again, model="ssam_small"))


def options(recipe: Recipe) -> list[str]:
    return [word for k, v in dataclasses.asdict(recipe).items() for word in (f"--{k.replace('_', '-')}", str(v))]


def test_bad_recipes_are_named(store, tmp_path):
    with pytest.raises(HearSsamError, match="Did you mean 'ssam_tiny'"):
        pretrain.pretrain(store, tmp_path / "run", dataclasses.replace(SMALL, model="ssam_tyni"))
    with pytest.raises(HearSsamError, match="Kaldi"):
        pretrain.pretrain(store, tmp_path / "run", dataclasses.replace(SMALL, model="ssamba_tiny"))
    with pytest.raises(HearSsamError, match="no finished store"):
        pretrain.pretrain(tmp_path / "nowhere", tmp_path / "run", SMALL)
    with pytest.raises(HearSsamError, match="min_frames=100"):
        pretrain.pretrain(store, tmp_path / "run", dataclasses.replace(SMALL, min_frames=100))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("stepz = 3\n")
    with pytest.raises(HearSsamError, match="Did you mean 'steps'"):
        pretrain.read_recipe(recipe)
    recipe.write_text('model = "ssam_base"\nsteps = 200_000\n')
    assert Recipe(**pretrain.read_recipe(recipe)).steps == 200_000


def test_a_damaged_state_is_refused(store, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(b"half a file")
    with pytest.raises(HearSsamError, match="cannot be resumed"):
        pretrain.pretrain(store, tmp_path / "run", SMALL)
