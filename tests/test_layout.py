"""Models as folders of Hugging Face's layout: ours, and transformers' where it is installed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from hear_ssam import HearModel, get_scene_embeddings, get_timestamp_embeddings, load_model
from hear_ssam.checkpoint import save_checkpoint
from hear_ssam.config import build_config
from hear_ssam.encoder import Encoder
from hear_ssam.hear import EncoderModel

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model() -> EncoderModel:
    torch.manual_seed(0)
    config = build_config("ssam", 32, depth=2, pooling="mean_std")
    tiny = EncoderModel("small_one", config, Encoder(config), None, "").eval()
    tiny.info = {"licence": "CC0-1.0", "source": "a test"}
    return tiny


@pytest.fixture(scope="module")
def folder(model: EncoderModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save_pretrained(tmp_path_factory.mktemp("saved") / "small_one")


def noise(*samples: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, generator=generator) - 0.5 for count in samples]


def test_what_was_saved_is_loaded(
    model: EncoderModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = HearModel.from_pretrained(folder, device="cpu")
    audio = torch.stack(noise(20_000, 20_000))
    assert again.name == "small_one" and len(again.checkpoint_sha256) == 64
    assert torch.equal(get_scene_embeddings(audio, again), get_scene_embeddings(audio, model))
    monkeypatch.chdir(folder)
    assert load_model(".").name == "small_one"
    monkeypatch.chdir(tmp_path)
    Path("ssam_base").symlink_to(folder)  # what the name means lies on a web drive
    assert load_model("ssam_base").config == model.config
    assert load_model(folder, pooling="mean").scene_embedding_size == model.timestamp_embedding_size


def test_the_card_has_its_header(model: EncoderModel, folder: Path) -> None:
    _, header, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    values = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in header.splitlines())}
    assert values["license"] == "cc0-1.0" and values["library_name"] == "hear-ssam" and "ssam" in values["tags"]
    assert "# small_one" in text and "source: a test" in text and str(model.scene_embedding_size) in text


def test_a_text_beside_the_weights_may_be_of_any_encoding(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path / "own.safetensors")
    (tmp_path / "own.md").write_bytes(b"caf\xe9")
    assert load_model(tmp_path / "own.safetensors").card == "caf\ufffd"


def test_the_shipped_model_takes_its_card_along(tmp_path: Path) -> None:
    text = (load_model().save_pretrained(tmp_path) / "README.md").read_text("utf-8")
    assert text.startswith("---\n") and 'license: "apache-2.0"' in text
    assert "No audio is distributed here" in text and text.count("\n# ") == 1
    once = load_model(tmp_path).save_pretrained(tmp_path / "once")  # from folder to folder
    again = (load_model(once).save_pretrained(tmp_path / "twice") / "README.md").read_text("utf-8")
    about = [page.partition("## About these weights")[2].strip() for page in (text, again)]
    assert about[0] == about[1] and again.count("## About these weights") == 1


def test_a_folder_of_a_training_takes_its_card_along(model: EncoderModel, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run" / "ssam_tiny.safetensors", model.config, model.encoder.state_dict(), {})
    (tmp_path / "run" / "ssam_tiny.md").write_text("# ssam_tiny\n\nTrained on rain.\n", "utf-8")
    (tmp_path / "run" / "README.md").write_text("# My project\n", "utf-8")
    for made_of, made in (("run", "out"), ("out", "again")):
        page = load_model(tmp_path / made_of).save_pretrained(tmp_path / made) / "README.md"
        assert page.read_text("utf-8").endswith("## About these weights\n\nTrained on rain.\n\n")


def test_weights_trained_further_do_not_take_the_card_along(tmp_path: Path) -> None:
    """Numbers and hash of the original say nothing about them."""
    model = load_model()
    assert isinstance(model, EncoderModel) and model.facts() == (model.info, model.card, model.checkpoint_sha256)
    with torch.no_grad():
        model.encoder.blocks[3].norm.weight.data.mul_(1.001)
    text = (model.save_pretrained(tmp_path) / "README.md").read_text("utf-8")
    assert f"source: ssam_tiny ({model.checkpoint_sha256[:12]}), changed after it was loaded" in text
    assert 'license: "apache-2.0"' in text and "No audio is distributed" not in text
    again = load_model(tmp_path)
    assert isinstance(again, EncoderModel) and set(again.info) == {"source", "licence", "name", "sha256"}
    assert model.facts()[2] == "" and again.facts()[2] == again.checkpoint_sha256
    again.encoder.whitening.maps *= 2  # no parameter, and yet a weight
    assert again.facts()[2] == ""


def test_transformers_gives_the_same_embeddings(
    model: EncoderModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    theirs = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    clips = noise(20_000, 36_000, 20_000)  # unequal: each must give what it gives alone
    inputs = extractor([clip.numpy() for clip in clips], sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        output = theirs(**inputs)
    for i, clip in enumerate(clips):
        scene, (rows, _) = get_scene_embeddings(clip[None], model), get_timestamp_embeddings(clip[None], model)
        torch.testing.assert_close(output.pooler_output[i], scene[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(output.last_hidden_state[i, : rows.shape[1]], rows[0], rtol=0, atol=1e-6)
        assert not output.last_hidden_state[i, rows.shape[1] :].any()
    extractor.padding_side = "left"
    inputs = extractor([clip.numpy() for clip in clips], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).pooler_output, output.pooler_output, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="sampling_rate must be 16000, not 8000"):
        extractor(clips[0].numpy(), sampling_rate=8000)
    theirs.save_pretrained(tmp_path / "again")  # as after training: without our metadata, with its config
    scene = get_scene_embeddings(clips[0][None], load_model(tmp_path / "again"))
    torch.testing.assert_close(scene, get_scene_embeddings(clips[0][None], model), rtol=0, atol=1e-6)


def test_transformers_alone_loads_the_folder(folder: Path, tmp_path: Path) -> None:
    """In a process that has imported nothing of ours."""
    pytest.importorskip("transformers", reason="pip install transformers")
    code = "from transformers import AutoModel as A; A.from_pretrained('.', trust_remote_code=True)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)


class Hub(BaseHTTPRequestHandler):
    """What of the hub's interface a push needs."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        self.answer({"siblings": [], "id": "owner/small_one", "sha": "0" * 40, "private": True, "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/create"):
            self.answer({"url": f"http://{self.headers['Host']}/owner/small_one"})
        elif "/preupload/" in self.path:
            wanted = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            place = f"http://{self.headers['Host']}/owner/small_one/commit/{'0' * 40}"
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": place, "hookOutput": ""})
        else:
            self.answer({})

    def answer(self, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


def test_push_to_hub(folder: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="pip install 'hear-ssam[hub]'")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    code = f"""
import hear_ssam
model = hear_ssam.load_model({str(folder)!r})
print(model.push_to_hub("owner/small_one", token="hf_x"))
try: model.push_to_hub("no such name")
except hear_ssam.HearSsamError as error: print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
    try:
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    finally:
        server.shutdown()
        server.server_close()
    said = done.stdout.splitlines()
    assert len(said) == 2, done.stderr
    assert said[0] == f"{address}/owner/small_one" and said[1].startswith("no such name: cannot be pushed: ")
    assert Hub.files.keys() >= {"config.json", "preprocessor_config.json", "README.md", "modeling_hear_ssam.py"}
    assert Hub.files["config.json"] == (folder / "config.json").read_bytes()
    assert len(Hub.files["model.safetensors"]) > 10_000
