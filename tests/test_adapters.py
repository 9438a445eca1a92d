"""Other people's models as HEAR modules: transformers (tiny, random weights), X-ARES encoders, objects."""

import copy
import json
import shutil
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
import torch

import hear_ssam
from hear_ssam import HearSsamError
from hear_ssam.evaluation import hf, xares
from hear_ssam.evaluation.embeddings import embed_task, provenance
from hear_ssam.evaluation.module import judged, load_hear_model, object_sha256, weights_sha256
from hear_ssam.evaluation.rows import open_embeddings

from . import tiny_hear
from .tiny_tasks import write_task

# ---- transformers ----------------------------------------------------------------------------------------------------

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
SPEECH = {
    **SMALL,
    "hidden_size": 16,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
WHISPER = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
TOWER = {"patch_embeds_hidden_size": 8, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1], "hidden_size": 64}
TEXT = {**SMALL, "hidden_size": 16, "vocab_size": 50}
# kind → config, extractor, rate, rows of a second, width, samples that one input is padded to
KINDS = {
    "wav2vec2": ("Wav2Vec2", SPEECH, "Wav2Vec2FeatureExtractor", 16000, 49, 16),
    "hubert": ("Hubert", SPEECH, "Wav2Vec2FeatureExtractor", 16000, 49, 16),
    "ast": ("AST", {**SMALL, "hidden_size": 16, "max_length": 204}, "ASTFeatureExtractor", 16000, 9.3, 16),
    "whisper": ("Whisper", {**WHISPER, "max_source_positions": 100}, "WhisperFeatureExtractor", 16000, 50, 16),
    "clap": (
        "Clap",
        {"audio_config": TOWER, "text_config": TEXT, "projection_dim": 8},
        "ClapFeatureExtractor",
        48000,
        3,
        64,
    ),
}
EXTRACTORS = {
    "ASTFeatureExtractor": {"max_length": 204}, "WhisperFeatureExtractor": {"chunk_length": 2},
    "ClapFeatureExtractor": {"truncation": "rand_trunc", "padding": "repeatpad"},
}  # fmt: skip


def build(kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra [hf])")
    model, config, extractor, *_ = KINDS[kind]
    torch.manual_seed(0)
    made = getattr(transformers, f"{model}Model")(getattr(transformers, f"{model}Config")(**config))
    return made.eval(), getattr(transformers, extractor)(**EXTRACTORS.get(extractor, {}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / f"tiny-{kind}"
            for part in build(kind):
                part.save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_model_becomes_a_hear_module(folders, kind):
    """Rate of its extractor, rows within the audio and no padding among them, also for clips beyond its window."""
    *_, rate, rows, width = KINDS[kind]
    hear = load_hear_model(f"hf:{folders(kind)}", device="cpu")
    assert hear.name == f"hf:tiny-{kind}" and hear.sample_rate == rate
    assert hear.size("scene") == hear.size("timestamp") == width
    for seconds in (0.03, 1.0, 2.5, 12.0):
        audio = np.random.default_rng(0).normal(0, 0.1, (2, int(seconds * rate))).astype(np.float32)
        embedded, ms = hear.embed("timestamp", audio, "noise")
        assert embedded.shape[:2] == ms.shape and embedded.shape[2] == width and np.isfinite(embedded).all()
        assert (np.diff(ms) > 0).all() and 0 <= ms.min() and ms.max() <= 1000 * seconds
        assert ms.shape[1] == pytest.approx(seconds * rows, abs=0.03 * seconds * rows + 2)
        scene, _ = hear.embed("scene", audio, "noise")
        assert scene == pytest.approx(embedded.mean(1), abs=1e-5)


def test_rows_are_those_of_the_model(folders):
    model, extractor = build("hubert")
    audio = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    given = extractor(list(audio.numpy()), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**given, output_hidden_states=True)
    for layer, states in ((-1, wanted.last_hidden_state), (1, wanted.hidden_states[1])):
        loaded = hf.load_model(str(folders("hubert")), layer=layer)
        rows, ms = hf.get_timestamp_embeddings(audio, loaded)
        assert torch.allclose(rows, states, atol=1e-5)
        assert ms[0, :3].tolist() == [10, 30, 50]
        pooled = {"mean": states.mean(1), "max": states.amax(1), "first": states[:, 0]}
        pooled["mean_std"] = torch.cat([states.mean(1), states.std(1, unbiased=False)], 1)
        for pooling, scene in pooled.items():
            loaded.pooling = pooling
            assert torch.allclose(hf.get_scene_embeddings(audio, loaded), scene, atol=1e-5)


def test_rows_of_ast_follow_time(folders):
    """Noise in the second half alone: rows of the first half are those of silence, apart from attention."""
    model = hf.load_model(str(folders("ast")), layer=0)  # before any block looks at other patches
    silence = torch.zeros(1, 32000)
    noise = silence.clone()
    noise[:, 16000:] = torch.randn(16000, generator=torch.Generator().manual_seed(0))
    (quiet, ms), (half, _) = (hf.get_timestamp_embeddings(audio, model) for audio in (silence, noise))
    moved = (half - quiet).norm(dim=2)[0] / quiet.norm(dim=2)[0]
    assert moved[ms[0] > 1200].min() > 10 * moved[ms[0] < 800].max()


def test_fused_clap_takes_no_clip_by_chance_for_a_longer_one():
    transformers = pytest.importorskip("transformers")
    tower = {**TOWER, "enable_fusion": True}
    config = transformers.ClapConfig(audio_config=tower, text_config=TEXT, projection_dim=8)
    hear = judged((transformers.ClapModel(config).eval(), transformers.ClapFeatureExtractor()), "cpu")
    audio = np.random.default_rng(0).normal(0, 0.1, (4, 48000)).astype(np.float32)
    found = [hear.embed("scene", audio, "noise")[0] for _ in range(4)]
    alone = np.concatenate([hear.embed("scene", clip[None], "noise")[0] for clip in audio])
    assert all(np.allclose(one, alone, atol=1e-5) for one in found)


def test_rows_of_an_adapter_span_the_audio():
    """It thins out the rows, which the configuration does not say."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(**SPEECH, add_adapter=True, num_adapter_layers=2)
    hear = judged((transformers.Wav2Vec2Model(config).train(), transformers.Wav2Vec2FeatureExtractor()), "cpu")
    _, ms = hear.embed("timestamp", np.zeros((1, 32000), np.float32), "silence")
    assert ms[0] == pytest.approx(np.arange(40, 2000, 80)) and not hear.model.training  # two layers, each every second


def test_settings_make_another_model(folders, tmp_path):
    """Of equal weights: what the configuration or the feature extractor says differs."""
    plain = load_hear_model(f"hf:{folders('hubert')}", device="cpu")
    for name, change in (
        ("config.json", {"hidden_act": "relu"}),
        ("preprocessor_config.json", {"do_normalize": False}),
    ):
        other = tmp_path / name / "tiny-hubert"
        shutil.copytree(folders("hubert"), other)
        (other / name).write_text(json.dumps({**json.loads((other / name).read_text()), **change}))
        loaded = load_hear_model(f"hf:{other}", device="cpu")
        assert loaded.name == plain.name and loaded.checkpoint_sha256 != plain.checkpoint_sha256
    assert load_hear_model(f"hf:{folders('hubert')}").checkpoint_sha256 == plain.checkpoint_sha256


def test_windows_follow_one_another(folders):
    model = hf.load_model(str(folders("wav2vec2")), window=0.5)
    audio = torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    rows, ms = hf.get_timestamp_embeddings(audio, model)
    halves = [hf.get_timestamp_embeddings(half, model) for half in audio.split(8000, 1)]
    assert torch.allclose(rows, torch.cat([r for r, _ in halves], 1), atol=1e-6)
    assert torch.allclose(ms, torch.cat([halves[0][1], 500 + halves[1][1]], 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 9}, "layer=9: hf:tiny-hubert has 3; take 0 to 2"),
        ({"pooling": "median"}, "unknown pooling 'median'"),
        ({"window": 0.01}, "window=0.01: must be at least"),
        ({"window": 0}, "window=0: must be at least"),
        ({"layer": "1"}, "layer='1': must be a whole number"),
        ({"lyaer": 1}, "unknown option of hf: 'lyaer'. Did you mean 'layer'"),
    ],
)
def test_wrong_options(folders, options, message):
    with pytest.raises(HearSsamError, match=message):
        load_hear_model(f"hf:{folders('hubert')}:{json.dumps(options)}", device="cpu")


def test_what_cannot_be_loaded_is_one_line(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HearSsamError, match=r"layer=1: hf:tiny-clap has rows in time at its output alone"):
        load_hear_model(f"hf:{folders('clap')}:" + '{"layer": 1}')
    with pytest.raises(HearSsamError, match=r"^hf:.*nothing: cannot be loaded: .*; check the name"):
        load_hear_model(f"hf:{tmp_path}/nothing")
    with pytest.raises(HearSsamError, match="hf: name a model of the hub"):
        load_hear_model("hf:")
    with pytest.raises(HearSsamError, match="names its weights itself"):
        load_hear_model(f"hf:{folders('hubert')}", "weights.pt")
    config = json.loads((folders("hubert") / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModel": "odd.OddModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "odd.py").write_text("raise SystemExit('ran')\n")
    (tmp_path / "preprocessor_config.json").write_bytes((folders("hubert") / "preprocessor_config.json").read_bytes())
    with pytest.raises(HearSsamError, match=r"it brings code of its own; add \{\"trust_remote_code\": true\}"):
        load_hear_model(f"hf:{tmp_path}")
    model, extractor = build("hubert")
    model.forward = lambda *_, **__: (torch.zeros(1, 3, 16),)
    with pytest.raises(HearSsamError, match="hf:HubertModel: returned a tuple; it needs a last_hidden_state"):
        judged((model, extractor), "cpu")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(HearSsamError, match=r"pip install 'hear-ssam\[hf\]'"):
        load_hear_model("hf:any")


def test_weights_that_stay_random_are_named(folders, tmp_path):
    model, extractor = build("hubert")
    state = {name: value for name, value in model.state_dict().items() if "layers.1.attention" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    extractor.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"hf:.*: 8 weights are not in its files and stay random, encoder"):
        hf.load_model(str(tmp_path))


def test_another_rate_is_said_and_the_others_go_on(folders, tmp_path, serial, capsys):
    write_task(tmp_path / "tasks" / "tones")
    modules = [f"hf:{folders('clap')}", f"hf:{folders('wav2vec2')}"]
    records = hear_ssam.evaluate(modules, tmp_path / "tasks", "logreg", workers=1, device="cpu")
    assert {r["model"] for r in records} == {"hf:tiny-wav2vec2"}
    assert "tones has no 48000 Hz audio" in capsys.readouterr().err


# ---- X-ARES ----------------------------------------------------------------------------------------------------------

ENCODER = """
    import torch

    class BandsEncoder(torch.nn.Module):
        def __init__(self, bands=40, fault=""):
            super().__init__()
            self.sampling_rate, self.output_dim, self.hop_size_in_ms, self.fault = 16000, bands, 50, fault

        def forward(self, audio):
            frames = torch.nn.functional.pad(audio, (0, 800)).unfold(1, 800, 800)  # a row past the end, as many have
            power = torch.fft.rfft(frames, dim=-1).abs()[..., 1:].unflatten(-1, (self.output_dim, -1)).mean(-1)
            return (power.log1p(), None) if self.fault == "tuple" else power.log1p()
"""


@pytest.fixture
def encoder(tmp_path):
    file = tmp_path / "bands_encoder.py"
    file.write_text(textwrap.dedent(ENCODER))
    return file


def test_xares_encoder_becomes_a_hear_module(encoder):
    hear = load_hear_model(f"xares:{encoder}:BandsEncoder" + ':{"bands": 20}')
    assert (hear.name, hear.sample_rate, hear.size("scene")) == ("xares:BandsEncoder-bands=20", 16000, 20)
    audio = np.random.default_rng(0).normal(size=(3, 16000)).astype(np.float32)
    rows, ms = hear.embed("timestamp", audio, "noise")
    assert rows.shape == (3, 20, 20) and ms[0, :2].tolist() == [25, 75] and ms.max() == 975
    assert load_hear_model(f"xares:{encoder}").checkpoint_sha256  # of the file, where there are no weights
    odd = load_hear_model(f"xares:{encoder}" + ':{"fault": "tuple"}')
    with pytest.raises(HearSsamError, match="returned tuple; X-ARES asks for a tensor"):
        odd.embed("scene", audio, "noise")


def test_xares_files_that_do_not_fit(encoder, tmp_path):
    for text, message in (
        (f"{tmp_path}/no.py", "no such file; name a file of Python"),
        (f"{encoder}:Bands", "unknown encoder 'Bands'. Did you mean 'BandsEncoder'"),
    ):
        with pytest.raises(HearSsamError, match=message):
            load_hear_model(f"xares:{text}")
    encoder.write_text(encoder.read_text() + "\nclass OtherEncoder:\n    sampling_rate = 16000\n")
    with pytest.raises(HearSsamError, match="BandsEncoder, OtherEncoder; name one"):
        load_hear_model(f"xares:{encoder}")
    with pytest.raises(HearSsamError, match="xares:OtherEncoder: has no number output_dim"):
        load_hear_model(f"xares:{encoder}:OtherEncoder")
    encoder.write_text("import missing_package\n")
    with pytest.raises(HearSsamError, match="cannot be imported: ModuleNotFoundError"):
        load_hear_model(f"xares:{encoder}")


def test_other_weights_or_code_are_another_model(encoder, tmp_path):
    one = load_hear_model(f"xares:{encoder}")
    task = write_task(tmp_path / "tones")
    folder = embed_task(one, task, tmp_path / "made")
    encoder.write_text(encoder.read_text().replace("log1p", "sqrt"))
    other = load_hear_model(f"xares:{encoder}")
    assert (one.name, one.checkpoint_sha256 == other.checkpoint_sha256) == (other.name, False)
    embed_task(other, task, folder)
    assert provenance(folder)["checkpoint_sha256"] == other.checkpoint_sha256 and open_embeddings(folder)
    linear = torch.nn.Linear(2, 2)
    before = weights_sha256(linear)
    linear.weight.data[0, 0] += 1
    assert (
        weights_sha256(linear) != before and weights_sha256(linear.bfloat16()) and not weights_sha256(torch.nn.ReLU())
    )


SIBLING = """
    import torch
    from bands import HEIGHT

    class HeightEncoder(torch.nn.Linear):
        sampling_rate, output_dim, hop_size_in_ms = 16000, 4, 50

        def __init__(self):
            super().__init__(1, 1, bias=False)
            torch.nn.init.ones_(self.weight)

        def forward(self, audio):
            return HEIGHT + 0 * audio[:, :80].unflatten(1, (20, 4))
"""


def test_encoders_import_what_lies_beside_them(tmp_path, serial):
    """Not what another encoder, or they themselves before, imported by that name; and it is a part of what they are."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "encoder.py").write_text(textwrap.dedent(SIBLING))
    digests = []
    for name, height in (("a", 1), ("b", 2), ("a", 1), ("a", 34)):
        (tmp_path / name / "bands.py").write_text(f"HEIGHT = {height}\n")
        hear = load_hear_model(f"xares:{tmp_path / name}/encoder.py", device="cpu")
        assert hear.embed("scene", np.zeros((1, 8000), np.float32), "silence")[0].tolist() == [[height] * 4]
        digests.append(hear.checkpoint_sha256)
    assert digests[0] == digests[2] and len(set(digests)) == 3
    assert len({digest[:8] for digest in digests}) == 3  # tables show so much of it


# ---- hear_ssam.evaluate ----------------------------------------------------------------------------------------------


def test_evaluate_takes_names_modules_and_objects(tmp_path, serial, encoder):
    assert isinstance(hear_ssam.evaluate, types.FunctionType)
    write_task(tmp_path / "tasks" / "tones", clips=9)
    namespace = {}
    exec(textwrap.dedent(ENCODER), namespace)
    models = [
        "tests.tiny_hear",
        tiny_hear,
        tiny_hear.load_model(bands=20),
        namespace["BandsEncoder"](),
        f"xares:{encoder}",
    ]
    records = hear_ssam.evaluate(models, tmp_path / "tasks", probe=["knn", "logreg"], workers=1)
    names = ["tests.tiny_hear", "Bands", "xares:BandsEncoder"]
    assert list(dict.fromkeys(r["model"] for r in records)) == names  # a module named twice runs once
    assert {r["embeddings"]["dim"] for r in records if r["model"] == "Bands"} == {20}
    assert (
        len({r["checkpoint_sha256"] for r in records if r["model"] == names[2]}) == 2
    )  # without its file, and with it
    model = hear_ssam.load_model("logmel")
    (record,) = hear_ssam.evaluate(model, tmp_path / "tasks", "knn", results_dir=tmp_path / "r", workers=1)[-1:]
    assert record["model"] == "logmel" and record["primary"] and (tmp_path / "r" / "records.jsonl").exists()


def test_evaluate_takes_a_transformers_model_with_its_extractor(tmp_path, serial):
    write_task(tmp_path / "tasks" / "tones")
    model, extractor = build("hubert")
    pairs = [build("wav2vec2"), (model, types.SimpleNamespace(feature_extractor=extractor))]  # the latter: a processor
    records = hear_ssam.evaluate(pairs, str(tmp_path / "tasks"), "logreg", results_dir=str(tmp_path / "r"), workers=1)
    assert {r["model"] for r in records} == {"hf:Wav2Vec2Model", "hf:HubertModel"} and records[0]["checkpoint_sha256"]


def test_objects_of_one_name_are_told_apart_by_their_settings(tmp_path, serial):
    one, same, other = hear_ssam.load_model("logmel"), hear_ssam.load_model("logmel"), hear_ssam.load_model("logmel")
    other.frontend.unused = ["another", 2]
    assert judged(one).checkpoint_sha256 == judged(same).checkpoint_sha256 != judged(other).checkpoint_sha256
    pooled = [judged(hear_ssam.load_model(pooling=pooling)).checkpoint_sha256 for pooling in ("mean", "mean_std")]
    assert len(set(pooled)) == 2
    write_task(tmp_path / "tasks" / "tones")
    models = [tiny_hear.load_model(bands=20), tiny_hear.load_model(bands=40)]
    records = hear_ssam.evaluate(models, tmp_path / "tasks", "knn", tasks="tones", workers=1)
    assert sorted({r["embeddings"]["dim"] for r in records}) == [20, 40]


def test_an_object_is_judged_as_it_is_now(tmp_path, serial):
    """Weights that were trained on since they were loaded; in eval mode, but left in training mode where it was."""
    write_task(tmp_path / "tasks" / "tones")
    loaded = hear_ssam.load_model()
    tuned = copy.deepcopy(loaded).train()
    torch.nn.init.zeros_(tuned.encoder.patch_embed.weight)
    tuned.frontend.eval()

    def scores(models):
        found = hear_ssam.evaluate(models, tmp_path / "tasks", "knn", results_dir=tmp_path / "r", workers=1)
        return {r["checkpoint_sha256"]: r["score"] for r in found if r["primary"] and r["fold"] is None}

    first = scores(loaded)
    assert not first.keys() & scores(tuned).keys() and len(scores([loaded, tuned])) == 2
    assert tuned.training and tuned.encoder.training and not (tuned.frontend.training or loaded.training)
    holders = [types.SimpleNamespace(inner=model.encoder.patch_embed) for model in (loaded, tuned)]
    assert len({object_sha256(holder) for holder in holders}) == 2  # classes that are no torch modules


def test_evaluate_says_what_it_cannot_judge(tmp_path, serial):
    write_task(tmp_path / "tasks" / "tones")
    with pytest.raises(HearSsamError, match="ReLU: cannot be judged; give a model of a HEAR module"):
        hear_ssam.evaluate(torch.nn.ReLU(), tmp_path / "tasks")
    with pytest.raises(HearSsamError, match="tuple: cannot be judged"):
        hear_ssam.evaluate((build("hubert")[0], "a tokenizer"), tmp_path / "tasks")
    facts = {"sampling_rate": 16000, "output_dim": 4, "hop_size_in_ms": 10}
    encoder = type("TinyEncoder", (torch.nn.Module,), facts)
    with pytest.raises(HearSsamError, match=r"tuple: cannot be judged; .* or a list of them"):
        hear_ssam.evaluate((tiny_hear, encoder()), tmp_path / "tasks")
    with pytest.raises(HearSsamError, match="type: cannot be judged"):
        hear_ssam.evaluate(encoder, tmp_path / "tasks")
    with pytest.raises(HearSsamError, match="models: an empty list"):
        hear_ssam.evaluate([], tmp_path / "tasks")
    with pytest.raises(HearSsamError, match=r"tones: .*NaN"):
        hear_ssam.evaluate(tiny_hear.load_model(broken="nan"), tmp_path / "tasks", workers=1)


def test_root_stays_light():
    code = "import sys, hear_ssam; assert callable(hear_ssam.evaluate) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert judged(tiny_hear.load_model()).module is tiny_hear and xares.wrap(3) is None
