"""Pre-training: what is drawn, that it learns, that an interrupted run goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import math
import signal

import numpy as np
import pytest
import torch
from filelock import FileLock

from hear_ssam import checkpoint, config
from hear_ssam.audio import Clip
from hear_ssam.cli import main
from hear_ssam.encoder import Encoder
from hear_ssam.errors import HearSsamError
from hear_ssam.frontend import EPSILON
from hear_ssam.pretraining.card import model_card
from hear_ssam.pretraining.codes import NONE, CodeTable
from hear_ssam.pretraining.loop import pretrain
from hear_ssam.pretraining.recipe import Codes, Latents, Pixels, Recipe, read_recipe
from hear_ssam.pretraining.store import Store, build_store, open_store
from hear_ssam.pretraining.windows import WindowSampler

SILENCE = math.log(EPSILON)
SSAM = config.CONFIGS["ssam_tiny"]
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
    windows = WindowSampler(open_store(store), dataclasses.replace(SMALL, max_frames=200), SSAM, torch.device("cpu"))
    spec = windows.draw(8, torch.Generator().manual_seed(0)).spec
    assert spec.shape == (8, 200, 80) and spec.dtype == torch.float32
    assert spec.mean((1, 2)).abs().max() < 1e-4
    torch.testing.assert_close(spec.std((1, 2)), torch.ones(8), rtol=1e-3, atol=1e-3)
    windows = WindowSampler(open_store(store), dataclasses.replace(SMALL, pad=0.5), SSAM, torch.device("cpu"))
    drawn = [windows.draw(8, torch.Generator().manual_seed(i // 2)).spec for i in range(8)]
    assert all(torch.equal(*drawn[i : i + 2]) for i in range(0, 8, 2)) and not torch.equal(drawn[1], drawn[2])


def test_held_out_clips_are_never_trained_on(store):
    opened = open_store(store)
    train = WindowSampler(opened, SMALL, SSAM, torch.device("cpu"))
    check = WindowSampler(opened, SMALL, SSAM, torch.device("cpu"), held_out=True)
    assert not ((train.weights > 0) & (check.weights > 0)).any()
    assert ((train.weights > 0) | (check.weights > 0)).all()


def test_short_clips_are_repeated_or_padded_with_silence(monkeypatch):
    clip = np.linspace(-3, 0, 48, dtype=np.float16)[:, None].repeat(80, 1)
    store = Store(np.concatenate([clip, clip]), np.array([0, 48, 96]), np.array([0, 0]), {})
    monkeypatch.setattr("hear_ssam.pretraining.windows.normalize", lambda spec, config: spec)
    for pad in (0.0, 1.0):
        recipe = Recipe(min_frames=200, max_frames=200, mix=0, pad=pad)
        drawn = WindowSampler(store, recipe, SSAM, torch.device("cpu")).draw(1, torch.Generator().manual_seed(0))
        spec = drawn.spec[0, :, 0]
        assert torch.equal(spec[:48], torch.from_numpy(clip[:, 0]).float())
        want = torch.full((152,), SILENCE) if pad else spec[:48].repeat(4)[:152]
        torch.testing.assert_close(spec[48:], want)
        assert torch.equal(drawn.asked[0], torch.arange(250) < 60)  # patches of what is repeated or padded


def test_training_lowers_the_loss_and_writes_a_loadable_checkpoint(store, tmp_path):
    recipe = dataclasses.replace(SMALL, steps=25, batch_size=8, learning_rate=3e-3)
    untrained = pretrain(store, tmp_path / "start", dataclasses.replace(recipe, steps=1))
    path = pretrain(store, tmp_path / "run", recipe)
    loss = [checkpoint.load_checkpoint(p)[2]["training"]["held_out_loss"] for p in (untrained, path)]
    assert loss[1] < 0.8 * loss[0]
    card = path.with_suffix(".md").read_text()
    assert "| source2 | 1 | 1.00 | CC0 | me |" in card and "200 windows" in card
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 25 and log[-1]["loss"] == log[-1]["pixels"] > 0
    assert log[-1]["ms_backward"] > 0 and "ms_teacher" in log[-1]


@pytest.mark.parametrize("system", ["ssam", "ssast", "axlstm", "ssamba"])
def test_all_systems_train_from_one_store_of_audio(tmp_path, monkeypatch, system):
    rng = np.random.default_rng(0)
    clips = (Clip("s", f"{i}", lambda: rng.normal(0, 0.1, 9_000).astype(np.float32)) for i in range(66))
    build_store(tmp_path / "store", clips)
    sizes = {"window_frames": 64} if system == "ssamba" else {}
    monkeypatch.setitem(config.CONFIGS, f"{system}_tiny", config.build_config(system, 48, depth=2, **sizes))
    path = pretrain(tmp_path / "store", tmp_path / "run", dataclasses.replace(SMALL, model=f"{system}_tiny", steps=1))
    stored, _, info = checkpoint.load_checkpoint(path)
    assert stored.system == system and 0 < info["training"]["held_out_loss"] < 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["after the draw", "in the forward pass", "after the optimiser"])
def test_a_run_stopped_anywhere_ends_with_the_same_weights(store, tmp_path, monkeypatch, where, number):
    recipe = dataclasses.replace(SMALL, steps=6)
    whole = pretrain(store, tmp_path / "whole", recipe)
    of, name = {
        "after the draw": (WindowSampler, "draw"),
        "in the forward pass": (Encoder, "embed"),
        "after the optimiser": (torch.optim.AdamW, "step"),
    }[where]
    method, calls = getattr(of, name), []

    def stopped(self, *args, **options):
        result = method(self, *args, **options)
        calls.append(where)
        if len(calls) == 4:
            signal.raise_signal(number)
        return result

    earlier = signal.signal(number, signal.default_int_handler)  # a job in the background would ignore Ctrl-C
    try:
        with monkeypatch.context() as patch:
            patch.setattr(of, name, stopped)
            assert main(["pretrain", str(store), str(tmp_path / "run"), *options(recipe)]) == 130
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, earlier)
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 4
    assert main(["pretrain", str(store), str(tmp_path / "run"), *options(recipe)]) == 0
    _, want, _ = checkpoint.load_checkpoint(whole)
    _, got, _ = checkpoint.load_checkpoint(tmp_path / "run" / "ssam_tiny.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)
    with pytest.raises(HearSsamError, match=r"state\.pt: holds a run with steps=6, not 7; repeat"):
        pretrain(store, tmp_path / "run", dataclasses.replace(recipe, steps=7))
    (store / "left-out.tsv").write_text("3\n")  # other data than the run began with
    with pytest.raises(HearSsamError, match=r"holds a run with store\.clips_left_out=0, not 1; repeat"):
        pretrain(store, tmp_path / "run", recipe)
    (store / "left-out.tsv").unlink()
    (store / "other").write_bytes((store / "frames.f16").read_bytes()[:-2] + b"00")
    (store / "other").replace(store / "frames.f16")  # the old one is mapped
    with pytest.raises(HearSsamError, match=r"holds a run with store\.sha256="):
        pretrain(store, tmp_path / "run", recipe)


def test_a_second_signal_ends_the_run_at_once(store, tmp_path, monkeypatch):
    def impatient(self, *args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(WindowSampler, "draw", impatient)
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(store, tmp_path / "run", SMALL)
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert not (tmp_path / "run").exists()


def test_three_steps_equal_a_plain_loop(store, tmp_path):
    recipe = dataclasses.replace(SMALL, warmup=0.5, weight_decay=0.3, clip_norm=0.1, learning_rate=1e-2)
    pretrain(store, tmp_path / "run", recipe)
    got = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["learner"]

    model = config.CONFIGS["ssam_tiny"]
    torch.manual_seed(recipe.seed)
    encoder = Encoder(model)
    generator = torch.Generator().manual_seed(recipe.seed)
    sampler = WindowSampler(open_store(store), recipe, model, torch.device("cpu"))
    weights = [p for p in encoder.parameters() if p.requires_grad]
    mean, square, norms = [torch.zeros_like(p) for p in weights], [torch.zeros_like(p) for p in weights], []
    for step, rate in enumerate([0, 2 / 3, (1 + math.cos(math.pi / 3)) / 2], 1):  # half of the steps warm up
        drawn = sampler.draw(recipe.batch_size, generator)
        predicted = encoder.head(encoder.tokens(drawn.spec, drawn.masks[0])[:, 1:])
        grads = torch.autograd.grad((predicted - encoder.patchify(drawn.spec)).square().mean(), weights)
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        for p, g, m, v in zip(weights, grads, mean, square, strict=True):
            g = g * min(1, 0.1 / norms[-1])
            m += (g - m) * (1 - 0.9)
            v += (g * g - v) * (1 - 0.95)
            with torch.no_grad():
                p *= 1 - 1e-2 * rate * (0.3 if p.dim() > 1 else 0)
                p -= 1e-2 * rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    assert min(norms) > 0.1  # clipping had something to do
    for name, want in encoder.state_dict().items():
        torch.testing.assert_close(
            got[f"encoder.{name}"], want, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_sources_count_by_the_square_root_of_their_hours():
    lengths = np.concatenate([[300], np.full(4, 250), np.full(54, 2000)])  # clip 0 is held out
    source = np.array([0] * 5 + [1] * 54)  # 1,300 and 108,000 frames
    values = source.astype(np.float16) + 1  # tells the sources apart
    frames = np.repeat(values, lengths)[:, None].repeat(80, 1) + np.linspace(0, 1, 80, dtype=np.float16)
    store = Store(frames, np.concatenate([[0], np.cumsum(lengths)]), source, {})
    recipe = Recipe(min_frames=200, max_frames=200, mix=0, pad=0)
    sampler = WindowSampler(store, recipe, SSAM, torch.device("cpu"))
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hear_ssam.pretraining.windows.normalize", lambda spec, config: spec)
        for seed in range(8):
            drawn.append(sampler.draw(500, torch.Generator().manual_seed(seed)).spec[:, 0, 0])
    share = (torch.cat(drawn) > 1.5).float().mean().item()
    want = math.sqrt(108_000) / (math.sqrt(108_000) + 1_000 / math.sqrt(1_300))
    assert abs(share - want) < 0.02


@pytest.mark.parametrize(("least", "most"), [(-10, 10), (-15, -3)])
def test_other_clips_are_added_so_much_louder_or_quieter(monkeypatch, least, most):
    """A clip that sounds in the low bands and one in the high bands: what is added shows in the other's bands."""
    monkeypatch.setattr("hear_ssam.pretraining.windows.normalize", lambda spec, config: spec)
    low, high = np.full((200, 80), -30, np.float16), np.full((200, 80), -30, np.float16)
    low[:, :40], high[:, 40:] = 0, 0
    store = Store(np.concatenate([low, low, high]), np.array([0, 200, 400, 600]), np.array([0, 0, 1]), {})
    recipe = Recipe(min_frames=200, max_frames=200, mix=0.5, mix_low=least, mix_high=most)
    drawn = WindowSampler(store, recipe, SSAM, torch.device("cpu")).draw(2000, torch.Generator().manual_seed(0))
    below, above = drawn.spec[:, 0, :40].mean(1), drawn.spec[:, 0, 40:].mean(1)
    both = (below > -20) & (above > -20)
    assert abs(both.float().mean() - 0.25) < 0.03  # half of the clips, half of those with their like
    added = 10 / math.log(10) * torch.where(drawn.clip == 2, below - above, above - below)[both]  # dB
    assert least - 0.1 < added.min() < least + 0.5 and most - 0.5 < added.max() < most + 0.1
    assert abs(added.mean() - (least + most) / 2) < 0.5 and abs(added.std() - (most - least) / 12**0.5) < 0.3


def test_clips_are_made_louder_or_softer(monkeypatch):
    monkeypatch.setattr("hear_ssam.pretraining.windows.normalize", lambda spec, config: spec)
    store = Store(np.zeros((600, 80), np.float16), np.array([0, 200, 400, 600]), np.array([0, 0, 1]), {})
    recipe = Recipe(min_frames=200, max_frames=200, mix=0, gain=6)
    spec = WindowSampler(store, recipe, SSAM, torch.device("cpu")).draw(500, torch.Generator().manual_seed(0)).spec
    gain = 10 / math.log(10) * spec[:, 0, 0]  # dB
    assert -6 < gain.min() < -5.5 and 5.5 < gain.max() < 6 and abs(gain.mean()) < 0.5
    assert (spec == spec[:, :1, :1]).all()


def test_windows_lie_anywhere_in_their_clips_and_codes_and_masks_belong_to_them(monkeypatch):
    """Every time slot holds its number, and so does its code; clip 2 is repeated, clip 0 held out."""
    monkeypatch.setattr("hear_ssam.pretraining.windows.normalize", lambda spec, config: spec)
    slots = np.array([60, 66, 20])
    numbers, first = np.arange(slots.sum(), dtype=np.uint16), np.array([0, 60, 126])
    frames = np.repeat(numbers, 4)[:, None].repeat(80, 1).astype(np.float16)
    store = Store(frames, np.array([0, 240, 504, 584]), np.array([0, 1, 2]), {})
    table = CodeTable(numbers[:, None], torch.from_numpy(first), {"bands": 5})
    recipe = Recipe(min_frames=200, max_frames=240, mix=0, pad=0, objective={"codes": Codes(), "pixels": Pixels()})
    sampler = WindowSampler(store, recipe, SSAM, torch.device("cpu"), codes=table)
    crops, heard, generator = set(), sampler.frames, torch.Generator().manual_seed(0)
    sampler.frames = lambda clip, frame: crops.add(frame.shape[1]) or heard(clip, frame)
    begins = []
    for _ in range(80):
        drawn = sampler.draw(4, generator)
        own = drawn.spec[:, ::4, 0].long().repeat_interleave(5, 1)  # (B, n)
        assert torch.equal(drawn.codes, own.where(drawn.asked, NONE)) and len(drawn.masks) == 1
        long = drawn.clip == 1
        assert drawn.asked[long].all() and (drawn.asked[~long].sum(1) <= 100).all()
        begins += (own[long, 0] - 60).tolist()
    assert crops == set(range(200, 241, 4))  # both ends
    assert set(begins) == set(range(17))
    recipe = dataclasses.replace(recipe, separate_masks=True)
    one, other = WindowSampler(store, recipe, SSAM, torch.device("cpu")).draw(4, generator).masks
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("broken", "step"), [(3, 1), (4, 2)])  # the loss of the second step, or the one held out
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(
    store, tmp_path, monkeypatch, broken, step
):
    recipe, draw, calls = dataclasses.replace(SMALL, steps=3), WindowSampler.draw, []

    def draw_broken(self, *args):
        calls.append(args)
        batch = draw(self, *args)
        return batch._replace(spec=batch.spec * (math.nan if len(calls) == broken else 1))

    monkeypatch.setattr(WindowSampler, "draw", draw_broken)
    with pytest.raises(
        HearSsamError, match=rf"run: the loss became nan at step {step} on clip .*; the state of step 1 is kept"
    ):
        pretrain(store, tmp_path / "run", recipe, save_minutes=0)  # saves after every step
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["step"] == 1 and all(tensor.isfinite().all() for tensor in state["learner"].values())
    monkeypatch.setattr(WindowSampler, "draw", draw)
    pretrain(store, tmp_path / "run", recipe)  # goes on from there


def test_sources_may_have_any_name(store, tmp_path):
    info = json.loads((store / "store.json").read_text())
    info["sources"][1]["name"] = "Küche, no UTF-8: \udcff"
    (store / "store.json").write_text(json.dumps(info))
    card = pretrain(store, tmp_path / "run", SMALL).with_suffix(".md")
    assert "\n| Küche, no UTF-8: \\udcff | 1 |" in card.read_text("utf-8")


def test_a_run_can_start_from_the_weights_of_another(store, tmp_path):
    first = pretrain(store, tmp_path / "first", dataclasses.replace(SMALL, steps=20, learning_rate=3e-3))
    again = dataclasses.replace(SMALL, steps=1, learning_rate=1e-9, init=str(first))
    path = pretrain(store, tmp_path / "again", again)
    (_, old, told), (_, new, info) = checkpoint.load_checkpoint(first), checkpoint.load_checkpoint(path)
    assert all(torch.allclose(new[name], old[name], rtol=2e-3, atol=1e-4) for name in old)  # half precision, 1 step
    assert info["training"]["init"]["sha256"] == told["sha256"]
    assert info["training"]["recipe"]["init"] == first.name  # where it lay is nobody's business
    card = path.with_suffix(".md").read_text()
    assert card.index("--steps 20") < card.index(told["sha256"]) < card.rindex("--steps 1")
    with pytest.raises(HearSsamError, match=r"width 32.* do not fit ssam_small"):
        pretrain(store, tmp_path / "other", dataclasses.replace(again, model="ssam_small"))


@pytest.mark.parametrize("name", ["axlstm", "codes", "ssam", "ssamba", "ssast", "visible", "", "RECIPE.toml"])
def test_the_card_tells_the_command(name):
    changed = {"init": "my weights.pth", "seed": 3}
    recipe = read_recipe(name, **changed) if name.islower() else Recipe(**changed)
    if name == "RECIPE.toml":
        recipe = dataclasses.replace(recipe, objective={"latents": Latents(block=1)})
    training = {"recipe": recipe.to_dict(), "clips_seen": 1, "versions": {"torch": "2"}}
    training["teacher"] = {"module": "theirs"}
    training |= dict.fromkeys(("epochs", "hours_of_audio", "loss", "held_out_loss", "wall_minutes", "device"), 1)
    card = model_card({"name": "x", "licence": "MIT", "training": training}, [])
    assert f"STORE OUT {f'--recipe {name} ' if name else ''}--seed 3 --init 'my weights.pth'\n" in card
    assert 'teacher of the codes: `{"module": "theirs"}`' in card


def options(recipe: Recipe) -> list[str]:
    fields = {k: v for k, v in recipe.to_dict().items() if k != "objective"}
    return [
        word
        for k, v in fields.items()
        if v is not False
        for word in (f"--{k.replace('_', '-')}", str(v))
        if v is not True
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('steps = "100"', "steps must be of type int, not '100'"),
        ("steps = 2.5", "steps must be of type int, not 2.5"),
        ("steps = true", "steps must be of type int, not True"),
        ("steps = 0", "steps must be at least 1, not 0"),
        ("model = 3", "model must be of type str"),
        ("mix = 7", "mix must be between 0 and 1, not 7"),
        ("pad = -0.1", "pad must be between 0 and 1"),
        ("warmup = 1.5", "warmup must be between 0 and 1"),
        ("learning_rate = nan", "learning_rate must be between 0 and 1, not nan"),
        ("seed = -1", "seed must be between 0"),
        ('precision = "fp16"', "precision: 'fp16'. Did you mean 'bf16'"),
        ("precision = [16]", r"precision: \[16\]"),
        ("max_frames = 250\nmin_frames = 300", "max_frames=250 is below min_frames=300; raise it"),
        ("min_frames = 100", "min_frames=100 is below the window of ssam_tiny; set at least 200"),
        ('model = "ssam_tyni"', "Did you mean 'ssam_tiny'"),
        ('model = "ssamba_tiny"', "min_frames=200 is below the window of ssamba_tiny; set at least 1024"),
        ("stepz = 3", "Did you mean 'steps'"),
        ("mask_ratio = 0.001", "mask_ratio=0.001 hides 0 of 250; hide some, not all"),
        ("mask_ratio = 1", "mask_ratio=1 hides 250 of 250"),
        ('mask_ratio = 0.009\nmask = "time"', "hides 0 of 50"),
        ("decoder_depth = 3", "without visible_only there is no decoder"),
        ("steps: 3", "cannot be read as TOML"),
    ],
)
def test_a_bad_recipe_names_the_file_and_the_field(tmp_path, capsys, line, message):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(line + "\n")
    with pytest.raises(HearSsamError, match=rf"^{recipe}: .*{message}"):
        read_recipe(recipe)
    assert main(["pretrain", "no-store", "no-run", "--recipe", str(recipe)]) == 2
    assert str(recipe) in capsys.readouterr().err


def test_a_recipe_file_and_options_are_checked_together(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(b"\xef\xbb\xbf" + b'model = "ssam_base"\nsteps = 200_000\nmax_frames = 700\nmix = 1\n')
    assert read_recipe(recipe) == Recipe("ssam_base", steps=200_000, max_frames=700, mix=1)
    assert read_recipe(recipe, steps=3).steps == 3
    with pytest.raises(HearSsamError, match=r"toml --min-frames 800: recipe field max_frames=700 is below"):
        read_recipe(recipe, min_frames=800)
    recipe.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HearSsamError, match=r"recipe\.toml: cannot be read"):
        read_recipe(recipe)


def test_what_would_fail_later_is_refused_at_once(store, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = ["pretrain", str(store), str(tmp_path / "file"), *options(SMALL)]
    assert main(command) == 2 and "file: cannot be written: " in capsys.readouterr().err
    for option, value in (("--keep", "0"), ("--save-minutes", "nan"), ("--probe-minutes", "-1")):
        assert main([*command, option, value]) == 2 and f"{option[2:6]}" in capsys.readouterr().err.split("=")[0]
    assert main([*command, "--recipe", "code"]) == 2 and "Did you mean 'codes'" in capsys.readouterr().err


def test_one_run_at_a_time_trains_in_a_folder(store, tmp_path, capsys):
    command = ["pretrain", str(store), str(tmp_path / "run"), *options(SMALL)]
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        assert main(command) == 2 and "run: another run writes to it; wait" in capsys.readouterr().err
    assert not (tmp_path / "run" / "state.pt").exists()
    (tmp_path / "run" / ".state.pt.x1y2z3_4").write_text("torn")  # by a run that was killed
    assert main(command) == 0 and not list((tmp_path / "run").glob(".*"))
    with FileLock(tmp_path / "run" / ".lock"):  # nor do two corpora or codes come into one
        assert main(["corpus", str(tmp_path / "run"), "--audio", str(tmp_path)]) == 2
        assert "run: another run of corpus writes to it" in capsys.readouterr().err
    with FileLock(store / ".lock"):
        assert main(["codes", str(store), "--checkpoint", str(tmp_path / "run"), "--block", "1"]) == 2
        assert "another run of codes writes to it" in capsys.readouterr().err
        assert main(["corpus", str(store), "--check-against", str(tmp_path)]) == 2  # not after hours of search
        assert "another run of corpus writes to it" in capsys.readouterr().err


def test_a_missing_or_small_store_is_named(store, tmp_path):
    with pytest.raises(HearSsamError, match="no finished store"):
        pretrain(tmp_path / "nowhere", tmp_path / "run", SMALL)
    assert not (tmp_path / "run").exists()
    np.savez(store / "clips.npz", offsets=np.array([0, 300]), source=np.array([0]))
    np.zeros((300, 80), np.float16).tofile(store / "frames.f16")
    with pytest.raises(HearSsamError, match=rf"^{store}: 1 clips are too few"):
        pretrain(store, tmp_path / "run", SMALL)


@pytest.mark.parametrize("content", [b"half a file", {"step": 3}, ["no", "state"]])
def test_a_damaged_state_is_refused(store, tmp_path, content):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "state.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(HearSsamError, match=rf"^{path}: cannot be resumed .*; delete it"):
        pretrain(store, tmp_path / "run", SMALL)
