"""The files for X-ARES and mteb, each against its own project, installed apart."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UPSTREAM = ROOT / "tests" / "upstream"

MTEB = """
import sys, types, importlib.machinery
import numpy as np, mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.task_metadata import TaskMetadata
import hear_ssam_models
stub = sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # mteb resamples with it; these clips need none
stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

class Tones(AbsTaskClassification):
    input_column_name = "audio"
    metadata = TaskMetadata(
        name="Tones", description="Three tones in noise.", dataset={"path": "none", "revision": "1"},
        type="AudioClassification", category="a2t", eval_splits=["test"], eval_langs=["eng-Latn"],
        main_score="accuracy", modalities=["audio"],
    )
    def load_data(self, **_):
        rng = np.random.default_rng(0)
        def part(count):
            labels = [i % 3 for i in range(count)]
            time = np.arange(16000) / 16000
            tone = lambda i: 0.3 * np.sin(2 * np.pi * [300, 1200, 4800][i] * time) + rng.normal(0, 0.01, 16000)
            audio = [{"array": tone(i), "sampling_rate": 16000} for i in labels]
            return Dataset.from_dict({"audio": audio, "label": labels})
        self.dataset, self.data_loaded = DatasetDict(train=part(30), test=part(12)), True

model = hear_ssam_models.HearSsamWrapper("hear_ssam/ssam_tiny", None)
model.mteb_model_meta = hear_ssam_models.ssam_tiny
(result,) = mteb.evaluate(model, Tones(), cache=None, overwrite_strategy="always").task_results
print("accuracy", result.get_score())
"""


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Python with this environment's packages below those of the two projects."""
    env = Path(os.environ.get("HEAR_SSAM_UPSTREAM_ENV", tmp_path_factory.mktemp("upstream") / "env"))
    if not (env / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
        (site,) = env.glob("lib/python*/site-packages")
        (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")

    def run(installs: list[str], *command: str) -> str:
        python = env / "bin" / "python"
        for line in installs:
            if subprocess.run([python, "-m", "pip", "install", "-q", *line.split()]).returncode:
                pytest.skip(f"{line} does not install here")
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{UPSTREAM}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([python, *command], env=environment, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.tools
def test_xares_takes_the_encoder(apart):
    apart(["--no-deps xares==0.1.3", "loguru"], str(UPSTREAM / "hear_ssam_encoder.py"))


@pytest.mark.slow
def test_mteb_takes_the_model(apart):
    accuracy = float(apart(["mteb==2.26.24"], "-c", MTEB).split()[-1])
    assert accuracy > 0.9
