"""Weights by name: a local server plays the hub, and the real huggingface_hub talks to it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from hear_ssam import cli, get_scene_embeddings, load_model
from hear_ssam.config import CONFIGS, build_config
from hear_ssam.download import fetch
from hear_ssam.encoder import Encoder
from hear_ssam.errors import HearSsamError
from hear_ssam.hear import EncoderModel
from hear_ssam.hub import weights as hub_weights
from hear_ssam.hub.weights import OFFICIAL, PUBLISHED, here
from hear_ssam.paths import sha256, shipped
from tests.test_checkpoint import official_weights

ROOT = Path(__file__).resolve().parent.parent
DATA = bytes(range(256)) * 4096  # 1 MiB


class Server(ThreadingHTTPServer):
    """Serves `files` (path → bytes), well or badly; `seen` lists what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.seen: list[tuple[str, str, str | None]] = []  # method, path, range
        self.cuts = 0  # how many of the next answers break off half-way
        self.stalls = 0  # how many of them fall silent half-way
        self.pause = 0.0  # seconds between two pieces
        self.claim = 0  # a false length
        self.commit = "0123456789" * 4
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self) -> list[str | None]:
        return [where for method, _, where in self.seen if method == "GET"]

    def handle_error(self, *_: object) -> None:
        """A client that has gone is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        server, where = self.server, self.headers.get("Range")
        server.seen.append((self.command, self.path, where))
        data = server.files.get(self.path)
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", server.commit)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag, start = f'"{hashlib.sha256(data).hexdigest()}"', 0
        if where and self.headers.get("If-Range", etag) == etag:
            start = int(where.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", etag)
        self.send_header("X-Repo-Commit", server.commit)
        self.send_header("Content-Length", str(server.claim or len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(data)
        if server.cuts or server.stalls:
            end = start + (len(data) - start) // 2
        for at in range(start, end, 1 << 17):
            self.wfile.write(data[at : min(at + (1 << 17), end)])
            time.sleep(server.pause)
        if server.stalls:
            server.stalls -= 1
            time.sleep(2)
        elif server.cuts:
            server.cuts -= 1
        self.close_connection = end < len(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    running = Server()
    threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


# ---------------------------------------------------------------------------------------------------- any file


def test_a_file_is_fetched_once_and_its_hash_remembered(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = DATA
    with pytest.warns(UserWarning, match=r"a\.bin: no hash is published"):
        digest = fetch(f"{server.url}/a.bin", tmp_path / "deep" / "a.bin")
    assert digest == hashlib.sha256(DATA).hexdigest()
    assert (tmp_path / "deep/a.bin").read_bytes() == DATA
    assert (tmp_path / "deep/a.bin.sha256").read_text() == f"{digest}  a.bin\n"
    (tmp_path / "deep/.a.bin.lock").unlink()
    (tmp_path / "deep/.a.bin.lock").mkdir()  # as where nothing can be written
    assert fetch(f"{server.url}/a.bin", tmp_path / "deep/a.bin") == digest
    assert len(server.seen) == 1
    (tmp_path / "deep/.a.bin.lock").rmdir()
    (tmp_path / "deep/a.bin").unlink()
    server.files["/a.bin"] = DATA[:-1]
    with pytest.raises(HearSsamError, match=r"a\.bin: its SHA-256 \w+ is not that of the first download.*delete"):
        fetch(f"{server.url}/a.bin", tmp_path / "deep/a.bin")
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == [".a.bin.lock", "a.bin.sha256"]
    (tmp_path / "deep/a.bin").write_bytes(DATA[:-1])
    with pytest.raises(
        HearSsamError, match=r"changed or damaged; delete it and fetch it again, or delete .*a\.bin\.sha256"
    ):
        fetch(f"{server.url}/a.bin", tmp_path / "deep/a.bin")


def test_a_broken_connection_is_taken_up_again(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"], server.cuts = DATA, 2
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", hashlib.sha256(DATA).hexdigest())
    assert server.gets() == [None, "bytes=524288-", "bytes=786432-"]
    assert (tmp_path / "a.bin").read_bytes() == DATA


def test_a_later_call_goes_on_but_not_with_another_file(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"], server.pause = DATA, 0.2
    code = f"from hear_ssam.download import fetch; fetch('{server.url}/a.bin', '{tmp_path}/a.bin', '0')"
    for pinned in (DATA, DATA[::-1]):
        with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}) as stopped:
            part = tmp_path / ".a.bin.part"
            while not (part.exists() and part.stat().st_size):
                time.sleep(0.05)
            stopped.kill()
        assert not (tmp_path / "a.bin").exists()
        server.files["/a.bin"], server.pause = pinned, 0.0
        fetch(f"{server.url}/a.bin", tmp_path / "a.bin", hashlib.sha256(pinned).hexdigest())
        assert str(server.gets()[-1]).startswith("bytes=")
        assert (tmp_path / "a.bin").read_bytes() == pinned
        (tmp_path / "a.bin").unlink()
        server.files["/a.bin"], server.pause = DATA, 0.2


def test_silence_ends_an_attempt(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"], server.stalls = DATA, 1
    fetch(f"{server.url}/a.bin", tmp_path / "a.bin", hashlib.sha256(DATA).hexdigest(), timeout=0.3)
    assert server.gets() == [None, "bytes=524288-"]


def test_what_cannot_be_had_says_why_and_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/a.bin"] = DATA
    (tmp_path / "file").write_text("")
    for url, folder, pinned, message in (
        (f"{server.url}/b.bin", "out", None, r"/b\.bin: the server says 404"),
        (f"{server.url}/a.bin", "out", "0" * 64, r"/a\.bin: its SHA-256 \w+ is not the published one"),
        ("file:///etc/passwd", "out", None, "file:///etc/passwd: not an address on the web"),
        ("http://127.0.0.1:9/a.bin", "out", None, r"http://127\.0\.0\.1:9/a\.bin: .*refused.*try again later"),
        (f"{server.url}/a.bin", "file", None, r"file/a\.bin: cannot be written: .*; make room or use another place"),
    ):
        with pytest.raises(HearSsamError, match=message):
            fetch(url, tmp_path / folder / "a.bin", pinned)
    server.claim = 1 << 60
    with pytest.raises(HearSsamError, match=r"out: a\.bin needs \d+ MB, and \d+ MB are free; make room"):
        fetch(f"{server.url}/a.bin", tmp_path / "out" / "a.bin")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = len(server.seen)
    with pytest.raises(HearSsamError, match="HF_HUB_OFFLINE is set"):
        fetch(f"{server.url}/a.bin", tmp_path / "out" / "a.bin")
    assert len(server.seen) == count
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".a.bin.lock", ".a.bin.part.etag"}


def test_the_second_of_two_processes_waits(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"], server.pause = DATA, 0.3
    code = f"from hear_ssam.download import fetch; print(fetch('{server.url}/a.bin', '{tmp_path}/a.bin'))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {process.communicate()[0].strip() for process in both} == {hashlib.sha256(DATA).hexdigest()}
    assert server.gets() == [None]


# ---------------------------------------------------------------------------------------------------- the hub

OBTAIN = """
import shutil, sys, warnings
if "plain" in sys.argv:
    sys.modules["huggingface_hub"] = None  # as where it is not installed
from hear_ssam.errors import HearSsamError
from hear_ssam.hub.weights import OFFICIAL, Weights, obtain

warnings.formatwarning = lambda message, *_: f"warning: {message}\\n"
weights = Weights("ssamba_tiny", "400", OFFICIAL["ssamba"], "w.pth", hub="owner/repo", sha256=sys.argv[2] or None)
try:
    print(obtain(weights, lambda published, ours, _: shutil.copyfile(published, ours), sys.argv[1]).read_bytes() != b"")
except HearSsamError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
URL = "/owner/repo/resolve/main/w.pth"


class Client:
    """Runs OBTAIN against the server, with caches of its own."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.cache = folder / "cache"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def start(self, pinned: str = "", *words: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OBTAIN, str(self.cache), pinned, *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env={**self.environment, **environment}, stdout=pipe, stderr=pipe, text=True)

    def __call__(self, pinned: str = "", *words: str, **environment: str) -> str:
        """What the process said, errors included; that its exit code tells of an error is checked."""
        process = self.start(pinned, *words, **environment)
        out, err = process.communicate()
        assert process.returncode == (0 if out else 2), err
        return out.strip() + err

    def files(self) -> set[str]:
        return {path.name for path in self.cache.rglob("*") if not path.name.startswith(".")}


@pytest.fixture
def client(server: Server, tmp_path: Path) -> Client:
    pytest.importorskip("huggingface_hub", reason="the hub's client comes with pip install 'hear-ssam[hub]'")
    server.files[URL] = DATA
    return Client(server, tmp_path)


def test_whole_then_without_network(server: Server, client: Client) -> None:
    said = client(hashlib.sha256(DATA).hexdigest())
    assert said.startswith("True") and "no hash is published" not in said
    count = len(server.seen)
    assert client(hashlib.sha256(DATA).hexdigest(), HF_HUB_OFFLINE="1").startswith("True")
    assert len(server.seen) == count
    assert client.files() == {"ssamba_tiny.400.safetensors"}


def test_cut_off_and_resumed(server: Server, client: Client) -> None:
    server.files[URL], server.cuts = DATA * 24, 1  # the hub's client keeps whole pieces of 10 MB
    assert client(hashlib.sha256(DATA * 24).hexdigest()).startswith("True")
    first, second = server.gets()
    assert first is None and str(second).startswith("bytes=")


def test_silent_then_resumed(server: Server, client: Client) -> None:
    server.stalls = 1
    assert client(hashlib.sha256(DATA).hexdigest()).startswith("True")


def test_a_wrong_hash_is_an_error_and_not_kept(server: Server, client: Client) -> None:
    right = hashlib.sha256(DATA).hexdigest()
    server.files[URL] = DATA[::-1]
    assert "ssamba_tiny.400: its SHA-256" in client(right) and client.files() == set()
    server.files[URL] = DATA
    assert client(right).startswith("True")


def test_unpinned_warns_and_remembers(server: Server, client: Client) -> None:
    assert "warning: ssamba_tiny.400: no hash is published for it" in client()
    (client.cache / "ssamba_tiny.400.safetensors").unlink()
    server.files[URL], server.commit = DATA[::-1], "9876543210" * 4
    said = client()
    assert "is not that of the first download" in said and client.files() == {"w.pth.sha256"}


def test_not_there_or_no_network(server: Server, client: Client, tmp_path: Path) -> None:
    server.files.clear()
    assert "owner/repo/w.pth: cannot be had from the hub" in client()
    assert "unset HF_HUB_OFFLINE to download it" in client(HF_HUB_OFFLINE="1")
    (tmp_path / "cache").rename(tmp_path / "was")
    (tmp_path / "cache").write_text("a file where the cache should be")
    assert "cannot be written" in client()


def test_two_processes_at_once(server: Server, client: Client) -> None:
    server.pause = 0.2
    both = [client.start(hashlib.sha256(DATA).hexdigest()) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["True", "True"]
    assert server.gets() == [None]


def test_without_the_hubs_client_plain_https_serves(server: Server, client: Client) -> None:
    server.cuts = 1
    assert client(hashlib.sha256(DATA).hexdigest(), "plain").startswith("True")
    assert client.files() == {"ssamba_tiny.400.safetensors"} and server.gets() == [None, "bytes=524288-"]


# ---------------------------------------------------------------------------------------------------- the table


def test_the_table_knows_every_model_and_the_shipped_file() -> None:
    assert {weights.name for weights in PUBLISHED} == set(CONFIGS)
    assert len({weights.label for weights in PUBLISHED}) == len(PUBLISHED)
    ours = [weights for weights in PUBLISHED if weights.origin.page.startswith(("ships with", "checkpoints/"))]
    labels = ["ssam_tiny.open", "ssam_tiny.equal", "ssast_tiny.equal", "axlstm_tiny.equal"]
    assert [weights.label for weights in ours] == labels
    for weights in ours:
        assert (file := here(weights)) == shipped("checkpoints") / (weights.file or "")
        assert (sha256(file), file.stat().st_size) == (weights.sha256, weights.size), (
            "new weights? state them in hub/weights.py"
        )
        assert load_model(weights.label).config.system == weights.name.partition("_")[0]
    assert sum(file.stat().st_size for file in shipped("checkpoints").glob("*.safetensors")) < 40e6


def test_what_ships_needs_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run under a number without an account."""
    pwd = pytest.importorskip("pwd", reason="not on Windows")
    for name in ("HOME", "XDG_CACHE_HOME", "HEAR_SSAM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert load_model().name == "ssam_tiny"


def test_outside_a_checkout_ours_are_taken_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = shipped("checkpoints")
    monkeypatch.setattr(hub_weights, "shipped", lambda _: tmp_path)
    message = r"axlstm_tiny_equal\.safetensors lies in checkpoints/.* fetch axlstm_tiny\.equal --from PATH"
    with pytest.raises(HearSsamError, match=message):
        load_model("axlstm_tiny.equal", cache=tmp_path)
    fetch = ["models", "fetch", "axlstm_tiny.equal", "--cache", str(tmp_path), "--from"]
    assert cli.main([*fetch, str(ours / "ssam_tiny.safetensors")]) == 2
    assert "ssam_tiny.safetensors: its SHA-256" in capsys.readouterr().err
    assert cli.main([*fetch, str(ours / "axlstm_tiny_equal.safetensors")]) == 0
    assert load_model("axlstm_tiny.equal", cache=tmp_path).config.system == "axlstm"


@pytest.fixture
def published(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights as SSAMBA publishes them, on the server that plays the hub; the hub's client is not installed."""
    file = tmp_path / "ssamba_tiny_400.pth"
    torch.save({f"module.{name}": value for name, value in official_weights(CONFIGS["ssamba_tiny"]).items()}, file)
    server.files["/attentionisallyouneed369/ssamba/resolve/main/ssamba_tiny_400.pth"] = file.read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HEAR_SSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return file


def test_load_model_by_name(published: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    audio = torch.rand(1, 16000, generator=torch.Generator().manual_seed(0)) - 0.5
    (path,) = server.files
    server.files[path], right = b"<html>log in first</html>", server.files[path]
    with (
        pytest.warns(UserWarning, match="no hash is published"),
        pytest.raises(HearSsamError, match="not a checkpoint"),
    ):
        load_model("ssamba_tiny")
    server.files[path] = right  # and its hash is not taken for a change
    with pytest.warns(UserWarning, match="no hash is published"):
        model = load_model("ssamba_tiny")
    assert model.name == "ssamba_tiny" and model.checkpoint_sha256
    wanted = get_scene_embeddings(audio, load_model(published))
    assert torch.equal(get_scene_embeddings(audio, model), wanted)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torch.equal(get_scene_embeddings(audio, load_model("ssamba_tiny.400")), wanted)
    assert len(server.seen) == 2


def test_a_repository_is_a_model(published: Path, server: Server, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = build_config("ssam", 32, depth=1, pooling="mean_std")
    model = EncoderModel("mine", config, Encoder(config), None, "").eval()
    data = (model.save_pretrained(tmp_path / "mine") / "model.safetensors").read_bytes()
    server.files |= {f"/owner/mine/resolve/{revision}/model.safetensors": data for revision in ("main", "v1")}
    audio = torch.rand(1, 16000) - 0.5
    for name in ("owner/mine", "owner/mine@v1"):
        with pytest.warns(UserWarning, match="no hash is published"):
            loaded = load_model(name)
        assert loaded.name == "mine"
        assert torch.equal(get_scene_embeddings(audio, loaded), get_scene_embeddings(audio, model))
    with pytest.raises(HearSsamError, match=r"/owner/other/resolve/main/model\.safetensors: the server says 404"):
        load_model("owner/other")
    with pytest.raises(HearSsamError, match=f"^{tmp_path}/no.such.folder: no such file or folder"):
        load_model(tmp_path / "no.such.folder")


def test_the_commands(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["models", "fetch", "ssamba_tiny", "--from", str(published), "--cache", str(tmp_path / "own")]) == 0
    assert capsys.readouterr().out == f"ssamba_tiny: {tmp_path / 'own' / 'ssamba_tiny.400.safetensors'}\n"
    assert cli.main(["models", "list", "--json", "--cache", str(tmp_path / "own")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {name for name, row in rows.items() if row["weights"]} == {"ssam_tiny", "ssamba_tiny"}
    assert rows["ssam_base"]["published"]["origin"]["page"] == OFFICIAL["ssam"].page
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for words, message in (
        (["ssamba_tinny"], "unknown weights 'ssamba_tinny'. Did you mean 'ssamba_tiny'?"),
        (["ssam_base"], "ssam_base.r1: no program can fetch these weights from https://drive.google.com/"),
        (["ssamba_small"], "ssamba_small_400.pth: is not here"),
        (["ssamba_small", "--from", str(published)], "holds ssamba of width 192 and depth 24, not ssamba_small"),
        (["ssamba_small", "ssam_base", "--from", "x"], "--from: holds the weights of one model"),
        (["ssam_tiny.r1"], "hear-ssam models fetch ssam_tiny.r1 --from PATH"),
        (["ssam_tiny", "--from", str(published)], f"--from {published}: ssam_tiny.open is here already, in "),
    ):
        assert cli.main(["models", "fetch", *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["models", "fetch", "all"]) == 1  # some could not be had
    said = capsys.readouterr()
    assert f"ssam_base: {OFFICIAL['ssam'].page}" in said.out and said.err.count("HF_HUB_OFFLINE") == 3
