"""Objectives, decoder, codes and processes of pre-training: each by what it computes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

import hear_ssam
from hear_ssam import config
from hear_ssam.audio import Clip
from hear_ssam.checkpoint import load_checkpoint, save_checkpoint
from hear_ssam.cli import main
from hear_ssam.encoder import Encoder
from hear_ssam.errors import HearSsamError
from hear_ssam.evaluation.module import load_hear_model
from hear_ssam.evaluation.preview import logistic_scores, named_tasks
from hear_ssam.evaluation.tasks import read_task
from hear_ssam.frontend import LogMel, normalize
from hear_ssam.pretraining import codes, loop, watch
from hear_ssam.pretraining.learner import Decoder, Learner
from hear_ssam.pretraining.loop import pretrain
from hear_ssam.pretraining.recipe import (
    RECIPES,
    Codes,
    Contrast,
    Latents,
    Pixels,
    Recipe,
    from_dict,
    read_recipe,
)
from hear_ssam.pretraining.store import build_store, open_store
from hear_ssam.pretraining.windows import Batch, WindowSampler, random_mask

from .masked import predictions
from .tiny_tasks import write_task

CPU = torch.device("cpu")
SYSTEMS = ("ssam", "ssast", "axlstm", "ssamba")
HIDDEN_CODES = {"codes": Codes(), "pixels": Pixels(patches="hidden")}
VISIBLE = Recipe(steps=3, batch_size=4, max_frames=240, visible_only=True, mask_ratio=0.75, mix_low=-15, mix_high=-3)


@pytest.fixture(autouse=True)
def small_encoders(monkeypatch):
    for system in SYSTEMS:
        sizes = {"window_frames": 64} if system == "ssamba" else {}
        monkeypatch.setitem(config.CONFIGS, f"{system}_tiny", config.build_config(system, 48, depth=2, **sizes))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Tones of four pitches under noise, 0.3 to 4 s."""
    folder, rng = tmp_path_factory.mktemp("audio") / "store", np.random.default_rng(0)

    def tone(i):
        time = np.arange(int(rng.integers(5_000, 64_000))) / 16_000
        return (np.sin(2 * np.pi * 200 * 2 ** (i % 4) * time) + rng.normal(0, 0.1, len(time))).astype(np.float32) / 4

    build_store(folder, (Clip(f"source{i % 2}", f"clip{i}", lambda i=i: tone(i)) for i in range(70)), workers=1)
    return folder


@pytest.fixture()
def teacher(tmp_path):
    torch.manual_seed(5)
    small = config.CONFIGS["ssam_tiny"]
    save_checkpoint(tmp_path / "teacher.safetensors", small, Encoder(small).state_dict(), {})
    return tmp_path / "teacher.safetensors"


def module_features(store, module, model):
    hear = load_hear_model(module)
    return codes.module_features(store, functools.partial(hear.embed, "timestamp"), hear.sample_rate, model)


def batch_of(model, clips=3, hidden=0.6, seed=0):
    g = torch.Generator().manual_seed(seed)
    spec = torch.randn(clips, model.window_frames, model.n_mels, generator=g)
    mask = random_mask(clips, model, g, "random", hidden)
    asked = torch.rand(mask.shape, generator=g) < 0.8
    return Batch(spec, [mask], torch.arange(clips), asked, torch.randint(0, 7, mask.shape, generator=g))


# ----------------------------------------------------------------------------------------------- the encoder, the masks


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_encoder_reads_what_is_visible_and_nothing_else(system):
    torch.manual_seed(0)
    model = config.CONFIGS[f"{system}_tiny"]
    encoder, n = Encoder(model).eval(), model.num_patches
    drawn = batch_of(model)
    everything = torch.arange(n).expand(3, -1)
    torch.testing.assert_close(encoder.tokens(drawn.spec, visible=everything), encoder.tokens(drawn.spec))
    visible = (~drawn.masks[0]).nonzero()[:, 1].view(3, -1)
    tokens = encoder.tokens(drawn.spec, visible=visible)
    assert tokens.shape == (3, 1 + visible.shape[1], 48)
    learner = Learner(encoder, Recipe(model=f"{system}_tiny", visible_only=True, min_frames=200))
    before = learner._tokens(drawn.spec, drawn.masks[0])[0]
    changed = torch.where(drawn.masks[0][..., None], 9.0, encoder.patchify(drawn.spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "patchify", lambda spec: changed)
        assert torch.equal(encoder.tokens(drawn.spec, visible=visible), tokens)
        after = learner._tokens(drawn.spec, drawn.masks[0])[0]
    assert before.shape == (3, n, 48) and torch.equal(before, after)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_decoder_reads_tokens_and_masks_at_their_places(system):
    torch.manual_seed(0)
    model = config.CONFIGS[f"{system}_tiny"]
    decoder = Decoder(model, dataclasses.replace(VISIBLE, decoder_depth=2)).eval()
    n, visible = model.num_patches, torch.tensor([[0, 3, 4], [2, 5, 6]])
    tokens, positions = torch.randn(2, 4, 48), torch.randn(1, n, 48)
    entered = decoder.enter(tokens)
    want = torch.cat([entered[:, :1], (decoder.mask_token + positions).expand(2, -1, -1)], 1)
    for clip, places in enumerate(visible.tolist()):
        for token, place in enumerate(places):
            want[clip, 1 + place] = entered[clip, 1 + token] + positions[0, place]
    first, second = decoder.blocks
    want = second(first(want, reverse=False), reverse=model.flip_odd)
    torch.testing.assert_close(decoder(tokens, visible, positions), decoder.norm(want)[:, 1:])


@pytest.mark.parametrize("system", ["ssam", "ssamba"])
def test_masks(system):
    model = config.CONFIGS[f"{system}_tiny"]
    slots, bands = model.grid
    mask = random_mask(50, model, torch.Generator().manual_seed(0), "time", 0.3)
    grid = mask.view(50, slots, bands) if system == "ssam" else mask.view(50, bands, slots).mT
    assert torch.equal(grid.all(2), grid.any(2)) and (grid[:, :, 0].sum(1) == round(0.3 * slots)).all()
    assert (grid[:, :, 0].float().mean(0) > 0).all()
    for kind in ("random", "cluster"):
        mask = random_mask(50, model, torch.Generator().manual_seed(0), kind, 0.3)
        assert (mask.sum(1) == round(0.3 * model.num_patches)).all()
    assert not mask[:, 0].any()  # clusters leave the first patch
    few = random_mask(50, model, torch.Generator().manual_seed(0), "cluster", 9 / model.num_patches)
    grid = few.view(50, slots, bands) if system == "ssam" else few.view(50, bands, slots).mT
    near = grid.float()[:, None]  # every hidden patch has others beside it
    near = F.conv2d(near, torch.ones(1, 1, 3, 3), padding=1)[:, 0]
    assert (near[grid] >= 3).float().mean() > 0.9


# ------------------------------------------------------------------------------------------------------- the objectives


@pytest.mark.parametrize("system", ["ssam", "ssamba"])
def test_without_a_table_the_objective_is_the_published_one(system):
    torch.manual_seed(0)
    model = config.CONFIGS[f"{system}_tiny"]
    encoder, drawn = Encoder(model), batch_of(model, hidden=0.5)
    learner = Learner(encoder, Recipe(model=f"{system}_tiny", min_frames=200))
    assert not list(learner.heads)
    patches, mask = encoder.patchify(drawn.spec), drawn.masks[0]
    tokens = encoder.tokens(drawn.spec, mask)[:, 1:]
    if system == "ssam":
        want = (encoder.head(tokens) - patches).square().mean()
    else:
        nce = []
        for clip, predicted, hidden in zip(patches, encoder.contrast(tokens), mask, strict=True):
            nce.append(F.cross_entropy(clip[hidden] @ predicted[hidden].T, torch.arange(int(hidden.sum()))))
        want = sum(nce) / 3 + 10 * (encoder.generate(tokens) - patches)[mask].square().mean()
    torch.testing.assert_close(learner.total(learner(drawn)).mean(), want)
    if system == "ssamba":  # independent masks: InfoNCE by the first, squared error by the second
        other = random_mask(3, model, torch.Generator().manual_seed(8), "random", 0.5)
        losses = learner(drawn._replace(masks=[drawn.masks[0], other]))
        torch.testing.assert_close(losses["contrast"].mean(), sum(nce) / 3)
        want = (predictions(encoder, drawn.spec, other) - patches)[other].square().mean()
        torch.testing.assert_close(losses["pixels"].mean(), want)


@pytest.mark.parametrize("visible_only", [False, True])
def test_objectives_compute_what_they_say(visible_only):
    torch.manual_seed(0)
    model = config.CONFIGS["ssam_tiny"]
    asked = {"codes": Codes(weight=2), "pixels": Pixels(patches="hidden", normalised=True), "latents": Latents(block=1)}
    recipe = dataclasses.replace(VISIBLE, visible_only=visible_only, objective=asked)
    learner, drawn = Learner(Encoder(model), recipe, clusters=7), batch_of(model)
    drawn.codes[:, ::9] = codes.NONE
    losses, parts = learner(drawn), learner(learner.teach(drawn))
    assert all(torch.equal(parts[name], loss) for name, loss in losses.items())
    patches, mask = learner.encoder.patchify(drawn.spec), drawn.masks[0]
    tokens = learner._tokens(drawn.spec, mask)[0]
    target = F.layer_norm(patches, (64,), eps=1e-6) * (63 / 64) ** 0.5
    head = learner.heads["pixels"] if visible_only else learner.encoder.head
    latent = F.layer_norm(learner.encoder.hidden(drawn.spec, [1])[0][:, 1:], (48,))
    for i in range(3):
        hidden = mask[i]
        want = (head(tokens[i, hidden]) - target[i, hidden]).square().mean()
        torch.testing.assert_close(losses["pixels"][i], want, rtol=1e-4, atol=1e-5)
        known = hidden & drawn.asked[i] & (drawn.codes[i] != codes.NONE)
        want = F.cross_entropy(learner.heads["codes"](tokens[i, known]), drawn.codes[i, known])
        torch.testing.assert_close(losses["codes"][i], want, rtol=1e-4, atol=1e-5)
        known = hidden & drawn.asked[i]
        want = F.smooth_l1_loss(learner.heads["latents"](tokens[i, known]), latent[i, known])
        torch.testing.assert_close(losses["latents"][i], want, rtol=1e-4, atol=1e-5)
    total = 2 * losses["codes"] + losses["pixels"] + losses["latents"]
    torch.testing.assert_close(learner.total(losses), total)
    silent = learner(drawn._replace(asked=torch.zeros_like(drawn.asked)))
    assert not silent["codes"].any() and not silent["latents"].any()  # nothing is asked, and nothing divided by it


def test_the_teacher_of_latents_follows_slowly():
    torch.manual_seed(0)
    recipe = dataclasses.replace(VISIBLE, objective={"latents": Latents(block=2, momentum=0.9)})
    learner = Learner(Encoder(config.CONFIGS["ssam_tiny"]), recipe)
    before = learner.teacher.norm.weight.clone()
    learner.encoder.norm.weight.data += 1
    learner.after_step()
    torch.testing.assert_close(learner.teacher.norm.weight, before + 0.1)
    assert not any(p.requires_grad for p in learner.teacher.parameters())


# ---------------------------------------------------------------------------------------------------------------- codes


def test_codes_of_a_checkpoint_train_an_encoder(store, teacher, tmp_path, capsys):
    assert (
        main(["codes", str(store), "--checkpoint", str(teacher), "--block", "2", "--clusters", "8", "--name", "c"]) == 0
    )
    opened, model = open_store(store), config.CONFIGS["ssam_tiny"]
    table = codes.open_codes(opened, "c", model)
    assert (
        table.info["clusters"] == 8
        and table.info["teacher"]["block"] == 2
        and len(table.info["teacher"]["sha256"]) == 64
    )
    recipe = dataclasses.replace(VISIBLE, pad=0.0, mix=1.0, objective={"codes": Codes(file="c")})
    sampler = WindowSampler(opened, recipe, model, CPU, codes=table)
    drawn = sampler.draw(6, torch.Generator().manual_seed(0))
    assert drawn.codes.shape == (6, 250) and ((drawn.codes < 8) | (drawn.codes == codes.NONE)).all()
    assert torch.equal(drawn.codes == codes.NONE, ~drawn.asked)  # what is repeated has no code
    losses = []
    for steps in (1, 40):
        run = dataclasses.replace(recipe, steps=steps, batch_size=8, learning_rate=3e-3, objective=recipe.objective)
        pretrain(store, tmp_path / f"run{steps}", run)
        losses.append(
            json.loads((tmp_path / f"run{steps}" / "log.jsonl").read_text().splitlines()[-1])["held_out_loss"]
        )
    assert losses[1] < 0.9 * losses[0]
    (tmp_path / "run40" / "state.pt").write_bytes((tmp_path / "run1" / "state.pt").read_bytes())
    again = dataclasses.replace(recipe, steps=1, batch_size=8, learning_rate=3e-3)
    (store / "c.json").write_text(json.dumps({**table.info, "teacher": {"sha256": "another"}}))
    with pytest.raises(HearSsamError, match=r"state\.pt: holds a run with codes\.teacher.*, not 'another'"):
        pretrain(store, tmp_path / "run40", again)
    with pytest.raises(HearSsamError, match=r"c\.json: codes of another grid"):
        codes.open_codes(opened, "c", config.CONFIGS["ssamba_tiny"])
    (store / "c.json").write_text(json.dumps({**table.info, "store": "another"}))
    with pytest.raises(HearSsamError, match=r"^.*c\.json: codes of another store"):
        pretrain(store, tmp_path / "other", recipe)
    np.save(store / "d.npy", table.codes[:-1])
    (store / "d.json").write_text(json.dumps(table.info))
    with pytest.raises(HearSsamError, match=r"d\.json: codes of another length"):
        codes.open_codes(opened, "d", model)
    (store / "d.npy").write_bytes(b"")
    with pytest.raises(HearSsamError, match=r"d\.json: no finished codes here"):
        codes.open_codes(opened, "d", model)
    with pytest.raises(HearSsamError, match=r"no finished codes here .*hear-ssam codes"):
        codes.open_codes(opened, "none", model)


def test_features_are_tokens_of_whole_clips_and_centres_the_means_of_their_rows(store, teacher):
    opened = open_store(store)
    model, features, _ = codes.encoder_features(opened, teacher, 1)
    longest = int(np.argmax(np.diff(opened.offsets)))
    audio = torch.from_numpy(opened[longest].astype(np.float32) / 32768)[None]
    spec = normalize(LogMel()(audio), model)[:, :400]
    encoder = Encoder(model).eval()
    encoder.load_state_dict(load_checkpoint(teacher)[1])
    want = encoder.hidden(spec[:, :200], [1])[0][0, 1:].view(-1, 5, 48)
    (whole,), (first,) = features([(longest, None)]), features([(longest, 0)])
    torch.testing.assert_close(whole[: len(want)], want.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first, whole[:50])
    assert len(whole) == (1 + len(opened[longest]) // 160) // 4
    alone = [features([(clip, None)])[0] for clip in range(len(opened))]
    for x, want in zip(features([(clip, None) for clip in range(len(opened))]), alone, strict=True):
        torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-4)

    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    centres = codes.k_means(x, 4)
    found = codes.nearest(x, centres)
    assert torch.equal(found, torch.cdist(x, centres).argmin(1))
    torch.testing.assert_close(centres, torch.stack([x[found == i].mean(0) for i in range(4)]), rtol=0, atol=0.2)


def test_a_module_reads_only_what_is_near():
    class Long(list):
        holds_audio = True
        name = staticmethod(str)

    sound = np.random.default_rng(0).normal(0, 3000, 35 * 16000).astype(np.int16)
    hear, given = load_hear_model("tests.tiny_hear"), []

    def embed(audio, name):
        given.append(audio.shape[1] / hear.sample_rate)
        return hear.embed("timestamp", audio, name)

    features = codes.module_features(Long([sound]), embed, hear.sample_rate, config.CONFIGS["ssam_tiny"])
    whole, *windows = features([(0, None), *((0, window) for window in range(18))])
    assert len(whole) == 35 * 25 + 1 and max(given) <= 20 < sum(given[:3])
    rows, ms = (x[0] for x in hear.embed("timestamp", np.float32(sound / 32768)[None], "all"))
    for slot in range(0, 875, 7):  # frames of tiny_hear hear 50 ms and no more
        want = rows[np.abs(ms - (40 * slot + 20)).argmin()]
        np.testing.assert_allclose(whole[slot, 0], want, rtol=1e-4, atol=1e-4)
    for window, part in enumerate(windows):
        torch.testing.assert_close(part, whole[50 * window : 50 * (window + 1)])


@pytest.mark.parametrize(
    ("broken", "message"),
    [("rate", ""), ("numpy", ""), ("bfloat16", ""), ("exit", "SystemExit: 3"), ("exit at once", "load_model failed"),
     ("empty", "no frames for clip"), ("silence", "has embeddings that are not finite"), ("tolist", "returned a list")],
)  # fmt: skip
def test_a_teacher_returns_what_real_modules_do_or_is_named(store, monkeypatch, capsys, broken, message):
    """Of any sample rate (12,345 Hz here)."""
    monkeypatch.setattr(codes, "SAMPLE", 300)
    if broken == "silence":
        monkeypatch.setattr(type(open_store(store)), "__getitem__", lambda self, i: np.zeros(20_000, np.int16))
    module = f"tests.tiny_hear:{json.dumps({'broken': broken})}"
    assert main(["codes", str(store), "--name", "b", "--module", module, "--clusters", "4"]) == (2 if message else 0)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "x", "--path", "y"], "--path y: says nothing about this teacher"),
        (["--module", "tests.tiny_hear", "--block", "3"], "--block 3: says nothing about this teacher"),
        (["--module", "tests.tiny_hear", "--device", "cuda:7"], "device 'cuda:7' cannot be used"),
        (["--module", "tests.tiny_hear", "--name", "store"], "codes cannot be named 'store'"),
        (["--module", "tests.tiny_hear", "--seed", "-1"], "seed -1 cannot be"),
    ],
)
def test_codes_that_cannot_be_are_refused(store, capsys, options, message):
    assert main(["codes", str(store), *options]) == 2 and message in capsys.readouterr().err
    assert open_store(store).holds_audio


def test_k_means_sees_the_clips_that_are_trained_on(store, monkeypatch):
    """Whether or not progress is shown; what is told of other codes of that name is gone before these are there."""
    opened, model, drawn = open_store(store), config.CONFIGS["ssam_tiny"], []
    monkeypatch.setattr(type(opened), "left_out", {3: "", 4: ""})
    monkeypatch.setattr(codes, "SAMPLE", 2000)
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def features(asked):
        drawn.extend(clip for clip, window in asked if window is not None)
        return [torch.randn(50, 1, 3, generator=torch.Generator().manual_seed(clip)) for clip, _ in asked]

    assert codes.build_codes(opened, "seen", model, features, {}, clusters=4)["used"] == 4
    assert len(drawn) == 64 and not {0, 3, 4, 64} & set(drawn)
    monkeypatch.setattr(json, "dumps", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        codes.build_codes(opened, "seen", model, features, {}, clusters=3)
    with pytest.raises(HearSsamError, match=r"seen\.json: no finished codes here"):
        codes.open_codes(opened, "seen", model)


def test_what_a_place_in_the_window_adds_makes_no_codes(store, monkeypatch):
    monkeypatch.setattr(codes, "SAMPLE", 2000)
    g = torch.Generator().manual_seed(0)
    kinds, places = torch.randn(4, 3, generator=g), 10 * torch.randn(50, 1, 3, generator=g)

    def features(asked):
        return [own[clip] + (places if window is not None else places.repeat(3, 1, 1)) for clip, window in asked]

    opened, model = open_store(store), config.CONFIGS["ssam_tiny"]
    # Spread, or rounding errors, which depend on threads, would decide between two centres that begin in one kind.
    own = kinds.repeat(len(opened), 1)[: len(opened)] + 0.05 * torch.randn(len(opened), 3, generator=g)
    codes.build_codes(opened, "placed", model, features, {}, clusters=4)
    table = codes.open_codes(opened, "placed", model)
    clips = [set(part[:, 0].tolist()) for part in np.split(table.codes, table.first[1:].tolist())]
    found = [frozenset().union(*clips[kind::4]) for kind in range(4)]
    assert len(set(found)) > 2 and all(one == other or not one & other for one in found for other in found)
    for seed in (0, 1):
        codes.build_codes(opened, f"again{seed}", model, features, {}, clusters=4, seed=seed)
    same, other = (codes.open_codes(opened, f"again{seed}", model).codes for seed in (0, 1))
    assert np.array_equal(same, table.codes) and not np.array_equal(other, table.codes)


def test_any_hear_module_is_a_teacher(store, tmp_path):
    opened, model = open_store(store), config.CONFIGS["ssam_tiny"]
    codes.build_codes(opened, "foreign", model, module_features(opened, "tests.tiny_hear", model), {}, clusters=12)
    table = codes.open_codes(opened, "foreign", model)
    assert table.codes.shape[1] == 1
    heard = [set(table.of(torch.tensor([i]), torch.arange(6)[None]).flatten().tolist()) for i in range(16)]
    pitches = [set().union(*heard[i::4]) for i in range(4)]
    assert not any(pitches[i] & pitches[j] for i in range(4) for j in range(i))  # each pitch has codes of its own
    recipe = dataclasses.replace(VISIBLE, objective={"codes": Codes(file="foreign")})
    assert pretrain(store, tmp_path / "run", recipe).exists()


def test_the_recipe_codes_from_nothing_by_the_public_commands(tmp_path, capsys):
    """Audio, a store, a first training by reconstruction, codes of it and of a foreign module, the training."""
    (tmp_path / "sounds").mkdir()
    for i in range(70):
        tone = np.sin(2 * np.pi * 200 * 2 ** (i % 4) * np.arange(9_000 + 100 * i) / 16_000) / 4
        noise = np.random.default_rng(i).normal(0, 0.02, len(tone))
        soundfile.write(tmp_path / "sounds" / f"{i}.wav", tone + noise, 16_000)
    folder, small = str(tmp_path / "store"), ["--batch-size", "4", "--device", "cpu"]
    first = tmp_path / "first" / "ssam_tiny.safetensors"
    lines = [
        ["corpus", folder, "--audio", str(tmp_path / "sounds")],
        ["pretrain", folder, str(tmp_path / "first"), "--recipe", "ssam", "--steps", "2", *small],
        ["codes", folder, "--checkpoint", str(first), "--block", "2", "--clusters", "9"],
        ["pretrain", folder, str(tmp_path / "run"), "--recipe", "codes", "--steps", "2", "--init", str(first), *small],
        ["codes", folder, "--module", "tests.tiny_hear", "--clusters", "9"],
        ["pretrain", folder, str(tmp_path / "distilled"), "--recipe", "codes", "--steps", "2", *small],
    ]
    for line in lines:
        assert main(line) == 0, line
    assert "of 9 codes are used" in capsys.readouterr().out
    taught = json.loads((tmp_path / "store" / "codes.json").read_text())["teacher"]
    assert taught["module"] == "tests.tiny_hear" and taught["name"] == load_hear_model("tests.tiny_hear").name
    assert json.dumps(taught) in (tmp_path / "distilled" / "ssam_tiny.md").read_text()
    for run in ("run", "distilled"):
        (row,) = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        assert 0 < row["codes"] < 6 and row["pixels"] > 0 and row["step"] == 2
        model = hear_ssam.load_model(str(tmp_path / run / "ssam_tiny.safetensors"), device="cpu")
        assert hear_ssam.get_scene_embeddings(torch.zeros(1, 16_000), model).isfinite().all()
    assert main(lines[3]) == 2 and "tiny_hear" in capsys.readouterr().err  # the codes are now another teacher's


# ------------------------------------------------------------------------------------------------- parts and processes


@pytest.mark.parametrize("more", [{}, {"objective": {"pixels": Pixels()}, "accumulate": 1}])
def test_parts_of_a_batch_give_the_step_of_the_whole(store, tmp_path, monkeypatch, more):
    recipe = dataclasses.replace(VISIBLE, batch_size=5, mix=1.0)
    states = []
    forward, sizes = Learner.forward, []
    monkeypatch.setattr(Learner, "forward", lambda self, batch: sizes.append(len(batch.clip)) or forward(self, batch))
    for accumulate in (1, 3):
        folder = tmp_path / f"parts{accumulate}"
        sizes.clear()
        pretrain(store, folder, dataclasses.replace(recipe, accumulate=accumulate))
        assert max(sizes) == -(-5 // accumulate)  # held-out windows, too
        states.append(torch.load(folder / "state.pt", weights_only=True))
    for name, whole in states[0]["learner"].items():
        torch.testing.assert_close(states[1]["learner"][name], whole, rtol=1e-4, atol=1e-5)
    held = [state["log"][-1]["held_out_loss"] for state in states]
    assert held[0] == pytest.approx(held[1], rel=1e-4)
    with pytest.raises(HearSsamError, match="batch_size=5 is below 1 processes x 6 parts"):
        pretrain(store, tmp_path / "many", dataclasses.replace(recipe, accumulate=6))


def test_two_processes_train_as_one_and_another_number_goes_on(store, tmp_path):
    recipe = ["--steps", "4", "--batch-size", "4", "--max-frames", "220", "--save-minutes", "0", "--keep", "9"]
    launcher = {1: [], 2: ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533"]}

    def train(name, processes):
        command = [*launcher[processes], "-m", "hear_ssam", "pretrain", str(store), str(tmp_path / name), *recipe]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], check=True, env=environment, capture_output=True)
        return [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    one, two = train("one", 1), train("two", 2)
    (tmp_path / "mixed").mkdir()
    shutil.copy(tmp_path / "two" / "state-000000002.pt", tmp_path / "mixed" / "state.pt")  # as if killed after step 2
    for other in (two, train("mixed", 1)):
        assert [row["step"] for row in one] == [row["step"] for row in other] == [1, 2, 3, 4]
        for key in ("loss", "held_out_loss"):
            np.testing.assert_allclose([r[key] for r in other], [r[key] for r in one], rtol=1e-4)


def test_a_process_that_died_and_a_full_disk_are_named(store, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("torch.distributed.all_reduce", broken)
    with pytest.raises(
        HearSsamError, match=r"another process .* ended \(Connection closed by peer\); the same command"
    ):
        loop._Ranks(0, 2, CPU).add([torch.zeros(2)], False)
    monkeypatch.setattr("torch.save", broken)
    with pytest.raises(HearSsamError, match=r"state\.pt: cannot be written: Connection.*; make room"):
        pretrain(store, tmp_path / "run", VISIBLE)
    assert not list((tmp_path / "run").glob("*"))


def test_the_latest_states_are_kept(store, tmp_path):
    pretrain(store, tmp_path / "run", dataclasses.replace(VISIBLE, steps=4), save_minutes=0, keep=2)
    assert sorted(p.name for p in (tmp_path / "run").glob("state*")) == [
        "state-000000003.pt", "state-000000004.pt", "state.pt",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- watching it


@pytest.mark.parametrize("system", ["ssam", "ssamba"])
def test_the_picture_puts_patches_in_their_places(system, tmp_path, monkeypatch):
    model = config.CONFIGS[f"{system}_tiny"]
    recipe = Recipe(model=f"{system}_tiny", min_frames=200, objective={"pixels": Pixels(normalised=True)})
    learner, drawn = Learner(Encoder(model), recipe), batch_of(model, clips=5)
    patches = learner.encoder.patchify(drawn.spec)
    torch.testing.assert_close(watch.as_pictures(learner.encoder, patches, drawn.spec), drawn.spec.mT.flip(1))
    mean, std = patches.mean(2, keepdim=True), (patches.var(2, keepdim=True) + 1e-6).sqrt()
    with monkeypatch.context() as patch:  # a perfect prediction of normalised patches is the input
        patch.setattr(learner, "_published_head", lambda objective: lambda tokens: (patches - mean) / std)
        hidden, predicted = learner.reconstruct(drawn)
    torch.testing.assert_close(predicted, patches, rtol=1e-4, atol=1e-4)
    assert torch.equal(hidden[..., 0], drawn.masks[0])
    watch.draw(tmp_path / "two.png", learner, drawn)
    wide = matplotlib.image.imread(tmp_path / "two.png")
    assert wide.ndim == 3 and wide.shape[1] > 400
    codes_only = Learner(Encoder(model), dataclasses.replace(recipe, mix=0, objective={"codes": Codes()}), 7)
    assert codes_only.reconstruct(drawn)[1] is None
    watch.draw(tmp_path / "one.png", codes_only, drawn)


def test_a_run_is_watched(store, tmp_path, capsys):
    """A picture of the same windows with every state; a probe of the weights of then, in the log."""
    task = write_task(tmp_path / "tones-v1.0", clips=9)
    run, options = tmp_path / "run", ["--batch-size", "4", "--max-frames", "220", "--save-minutes", "0"]
    command = ["pretrain", str(store), str(run), "--steps", "3", *options, "--device", "cpu"]
    assert main([*command, "--probe", str(task), "--probe-minutes", "0"]) == 0
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3 and all(0.3 <= row["tones-v1.0"] <= 1 for row in log)
    assert logistic_scores(run / "ssam_tiny.safetensors", named_tasks([tmp_path])) == {
        "tones-v1.0": log[-1]["tones-v1.0"]
    }
    assert matplotlib.image.imread(run / "picture.png").ndim == 3 and "tones-v1.0=" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "other"), *command[3:], "--probe", str(task)]) == 0  # at the end at least
    log = [json.loads(line) for line in (tmp_path / "other" / "log.jsonl").read_text().splitlines()]
    assert ["tones-v1.0" in row for row in log] == [False, False, True]
    events = write_task(tmp_path / "events", embedding_type="event")
    assert main([*command, "--probe", str(events)]) == 2 and "events: asks for events" in capsys.readouterr().err


@pytest.mark.parametrize("multilabel", [False, True])
def test_logistic_regression_scores_what_the_embeddings_tell(tmp_path, multilabel):
    kind = {"prediction_type": "multilabel", "evaluation": ["mAP"]} if multilabel else {}
    task = write_task(tmp_path / "tones", folds=3, clips=9, **kind)
    assert logistic_scores("logmel", [read_task(task)])["tones"] == 1.0


# --------------------------------------------------------------------------------------------------------- the recipes


def test_recipes_that_ship(monkeypatch):
    monkeypatch.undo()
    for path in RECIPES.glob("*.toml"):
        recipe = read_recipe(path.stem)
        assert recipe == read_recipe(path) == from_dict(recipe.to_dict())
        assert Learner(Encoder(config.CONFIGS[recipe.model]), recipe, 500).objectives
    ours = read_recipe("codes", steps=7)
    assert ours.steps == 7 and ours.objective == HIDDEN_CODES
    assert read_recipe("ssamba").objective == {"contrast": Contrast(), "pixels": Pixels(10, "hidden")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[objective.codez]", "Did you mean 'codes'"),
        ("[objective.codes]\nfiles = 'x'", r"objective\.codes:? 'files'. Did you mean 'file'"),
        ("[objective.pixels]\npatches = 'some'", r"objective\.pixels: patches"),
        ("[objective.pixels]\nweight = '3'", "weight must be of type float, not '3'"),
        ("objective = 'codes'", "objective must hold tables"),
        ("[objective.codes]", "mix_high=10.0 adds clips that are louder .*; set at most 0"),
        ("[objective.latents]\nblock = 13", "block=13, but ssam_tiny has 2"),
        ('model = "ssamba_tiny"\n[objective.latents]\nblock = 1', "block=1, but ssamba_tiny has 2, in pairs"),
        ("[objective.contrast]", "ssam_tiny has no contrastive head; set visible_only"),
        ("[objective.pixels]\nweight = 0", "every weight is 0"),
        ("mix_low = 11.0", "mix_high=10.0 is below mix_low=11.0"),
        ("mask = 'square'", "mask: 'square'"),
    ],
)
def test_contradictions_are_named(tmp_path, text, message):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(HearSsamError, match=rf"r\.toml: (unknown )?recipe field .*{message}"):
        read_recipe(tmp_path / "r.toml")
