"""What a GPU computes is what the CPU computes: kernels, functions, commands, training, an actor of Ray's.

`HEAR_SSAM_TEST_GPU=1 python -m pytest tests/test_gpu.py` runs them, on a machine with a GPU and a PyTorch built for it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from hear_ssam import HearModel, checkpoint, cli, embed, get_scene_embeddings, get_timestamp_embeddings, load_model
from hear_ssam.audio import Clip
from hear_ssam.config import SYSTEMS
from hear_ssam.evaluation.records import read
from hear_ssam.pretraining import codes
from hear_ssam.pretraining.loop import pretrain
from hear_ssam.pretraining.recipe import Recipe
from hear_ssam.pretraining.store import build_store

from .test_adapters import folders  # noqa: F401, a fixture
from .test_cluster import driving, embedded, until, workers
from .test_pretrain import store  # noqa: F401
from .test_systems import noise, tiny
from .tiny_tasks import write_task

ASKED = "HEAR_SSAM_TEST_GPU" in os.environ and torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not ASKED, reason="needs HEAR_SSAM_TEST_GPU=1, a GPU and a PyTorch built for it")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; clips of many lengths, one beyond a window, and no clip at all."""
    folder, random = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    for number in range(24):
        place = folder / ("low" if number % 2 else "noise")
        place.mkdir(exist_ok=True)
        time = np.arange(random.integers(3_000, 90_000)) / 16_000
        sound = np.sin(600 * time) if number % 2 else random.standard_normal(len(time))
        soundfile.write(place / f"{number:02}.wav", 0.1 * sound, 16_000)
    (folder / "noise" / "no.wav").write_text("no audio")
    return folder


def run(*arguments: object, code: int = 0) -> None:
    assert cli.main([str(argument) for argument in arguments]) == code


def near(found: Any, wanted: Any, tolerance: float = 1e-3) -> None:
    """By the norm of the difference: where audio is quiet, or a class does not vary, single numbers differ by more."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape and np.isfinite(found).all()
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


def assert_same_rows(one: Path, other: Path) -> None:
    found, wanted = embedded(one), embedded(other)
    for a, b in zip(found.pop("embedding"), wanted.pop("embedding"), strict=True):
        near(a, b)
    assert found == wanted


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["scan", "conv"])
def test_kernels_and_all_their_gradients_are_the_references(kernel: str, dtype: torch.dtype, reverse: bool) -> None:
    from benchmarks import gpu  # which needs Triton

    tolerance = (6e-4, 2e-3) if dtype == torch.float32 else (3e-2, 5e-2)
    for shape in ((2, 251, 576, 24), (2, 3, 33, 24), (3, 16, 7, 5), (2, 17, 100, 16)):
        assert gpu.verdict(kernel, shape, dtype, reverse, tolerance)["right"], shape


@pytest.mark.parametrize("system", SYSTEMS)
def test_embeddings_of_every_system(system: str) -> None:
    """fp32 to a thousandth, bf16 nearly parallel; from audio on the GPU, as HEAR asks."""
    model, audio = tiny(system), noise(3, 4.3)
    there = copy.deepcopy(model).to("cuda")
    scene, (rows, ms) = get_scene_embeddings(audio, model), get_timestamp_embeddings(audio, model)
    found, found_ms = get_timestamp_embeddings(audio.cuda(), there)
    assert found.is_cuda and torch.equal(found_ms.cpu(), ms)
    near(found.cpu(), rows)
    near(get_scene_embeddings(audio.cuda(), there).cpu(), scene)
    there.encoder.set_precision("bf16")
    low = get_scene_embeddings(audio.cuda(), there).float().cpu()
    assert torch.nn.functional.cosine_similarity(low, scene).min() > 0.995


def test_the_shipped_weights_and_a_saved_folder(tmp_path: Path) -> None:
    audio = noise(2, 3).numpy()
    model = load_model(device="cuda")
    wanted = embed(audio, load_model(device="cpu"))
    near(embed(audio, model), wanted)
    model.save_pretrained(tmp_path / "saved")
    again = HearModel.from_pretrained(tmp_path / "saved", device="cuda")
    near(embed(audio, again), wanted)
    transformers = pytest.importorskip("transformers")
    shim = transformers.AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True).to("cuda")
    with torch.no_grad():
        found = shim(torch.from_numpy(audio).cuda())
    near(found.pooler_output.cpu().numpy(), wanted)


@pytest.mark.parametrize("options", [[], ["--window", "1", "--hop", "0.7"], ["--dtype", "float16", "--kind", "scene"]])
def test_collections(recordings: Path, tmp_path: Path, options: list[str], same_thread_count: None) -> None:
    for device in ("cuda", "cpu"):
        run("embed", recordings, "-o", tmp_path / device, "--device", device, *options, code=1)
    assert_same_rows(tmp_path / "cuda", tmp_path / "cpu")


def test_classifier_and_search(recordings: Path, tmp_path: Path, capsys: Any, same_thread_count: None) -> None:
    found = []
    for device in ("cuda", "cpu"):
        run("classify", "train", recordings, "-o", tmp_path / f"{device}.json", "--device", device, code=1)
        out = tmp_path / f"{device}.csv"
        run("classify", "predict", tmp_path / f"{device}.json", recordings, "-o", out, "--device", device, code=1)
        found.append([line.split(",")[:2] for line in out.read_text().splitlines()])
    assert found[0] == found[1]
    run("embed", recordings, "-o", tmp_path / "all", "--kind", "scene", "--device", "cuda", code=1)
    capsys.readouterr()
    run("search", tmp_path / "all", recordings / "low" / "01.wav", "-k", "3", "--device", "cuda")
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["1.0000", str(recordings / "low" / "01.wav")]


def test_evaluation_of_any_model(folders: Any, tmp_path: Path, serial: None) -> None:  # noqa: F811
    for name, kind in (("tones", "scene"), ("events", "event")):
        write_task(tmp_path / "tasks" / name, embedding_type=kind)
    modules = ["hear_ssam", 'hear_ssam:{"model": "logmel"}', "tests.tiny_hear", f"hf:{folders('hubert')}",
               f"hf:{folders('whisper')}", f"xares:{ROOT / 'tests' / 'upstream' / 'hear_ssam_encoder.py'}"]  # fmt: skip
    for device in ("cuda", "cpu"):
        run("evaluate", *modules, "--tasks-dir", tmp_path / "tasks", "--results-dir", tmp_path / device,
            "--device", device, "--probe", "exact", "knn", "--seeds", "1")  # fmt: skip
        assert len({(r["model"], r["task"], r["probe"]) for r in read(tmp_path / device)}) == 6 * 3
    files = [file.relative_to(tmp_path / "cpu") for file in (tmp_path / "cpu" / "embeddings").rglob("*embeddings.npy")]
    assert len(files) == 6 * 2 * 3
    for file in files:
        found, wanted = (np.fromfile(tmp_path / device / file, np.float32) for device in ("cuda", "cpu"))
        near(found, wanted, 2e-3)


@pytest.mark.parametrize("recipe", [{}, {"visible_only": True, "mask": "random"}])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training(store: Any, tmp_path: Path, recipe: dict[str, Any], precision: str) -> None:  # noqa: F811
    """Its losses are those of the CPU, and it learns."""
    plan = Recipe(steps=6, batch_size=8, min_frames=200, max_frames=260, precision=precision, **recipe)
    losses = {}
    for device in ("cpu", "cuda"):
        pretrain(store, tmp_path / device, plan, device=device)
        log = (tmp_path / device / "log.jsonl").read_text().splitlines()
        losses[device] = json.loads(log[-1])["loss"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02 if precision == "bf16" else 2e-3)
    file = pretrain(store, tmp_path / "long", dataclasses.replace(plan, steps=40, learning_rate=3e-3), device="cuda")
    held_out = [checkpoint.load_checkpoint(p)[2]["training"]["held_out_loss"]
                for p in (tmp_path / "cuda" / file.name, file)]  # fmt: skip
    assert held_out[1] < held_out[0]


@pytest.mark.parametrize("teacher", [["--checkpoint", "ssam_tiny", "--block", "1"], ["--module", "tests.tiny_hear"]])
def test_codes_and_what_they_train(tmp_path: Path, monkeypatch: Any, teacher: list[str]) -> None:
    monkeypatch.setattr(codes, "SAMPLE", 300)
    random = np.random.default_rng(0)
    clips = (Clip("s", f"{i}", lambda: random.normal(0, 0.1, 40_000).astype(np.float32)) for i in range(70))
    build_store(tmp_path / "store", clips)
    run("codes", tmp_path / "store", *teacher, "--clusters", "4", "--device", "cuda")
    options = ["--steps", "3", "--batch-size", "4", "--device", "cuda", "--precision", "bf16"]
    run("pretrain", tmp_path / "store", tmp_path / "run", "--recipe", "codes", *options)


# ---- one actor for each GPU ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Any:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'hear-ssam[cluster]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("HEAR_SSAM_TEST", uuid.uuid4().hex)  # by which `workers` knows them
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
        nodes = Cluster()
        nodes.add_node(num_cpus=4, num_gpus=torch.cuda.device_count(), include_dashboard=False)
        nodes.wait_for_nodes(timeout=120)
        try:
            yield {**os.environ, "RAY_ADDRESS": nodes.address}
        finally:
            nodes.shutdown()


@pytest.mark.parametrize("killed", [False, True])
def test_an_actor_on_the_gpu_embeds(
    recordings: Path, tmp_path: Path, cluster: dict[str, str], killed: bool, same_thread_count: None
) -> None:
    command = ["-m", "hear_ssam", "embed", str(recordings), "-o", "out", "--engine", "ray"]
    with driving([*command, "--device", "cuda"], tmp_path, cluster) as driver:
        if killed:
            os.kill(until(lambda: workers(cluster), driver)[0], signal.SIGKILL)
    assert driver.returncode == 1  # of no.wav
    run("embed", recordings, "-o", tmp_path / "one", "--device", "cpu", code=1)
    assert_same_rows(tmp_path / "out", tmp_path / "one")


def test_an_actor_on_the_gpu_judges(tmp_path: Path, cluster: dict[str, str]) -> None:
    for name in ("a", "b", "c"):
        write_task(tmp_path / "tasks" / name)
    command = [sys.executable, "-m", "hear_ssam", "evaluate", "hear_ssam", "--tasks-dir", "tasks", "--probe", "exact",
               "knn", "--seeds", "2"]  # fmt: skip
    for name, options in (("ray", ["--engine", "ray", "--device", "cuda"]), ("one", ["--device", "cpu"])):
        subprocess.run([*command, "--results-dir", name, *options], cwd=tmp_path, env=cluster, check=True)
    found, wanted = (
        {(r["task"], r["probe"], r["seed"], r["metric"]) for r in read(tmp_path / n)} for n in ("ray", "one")
    )
    assert found == wanted and len(found) >= 3 * 3
