"""What several test files use: private material (only here is known where it lies), the HEAR tools, small weights."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from hear_ssam.checkpoint import save_checkpoint
from hear_ssam.config import build_config
from hear_ssam.encoder import Encoder
from hear_ssam.evaluation import jobs
from hear_ssam.heareval import INSTALL
from hear_ssam.scan import available_backends

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("HEAR_SSAM_SHARED", ROOT.parent / "shared"))


def pytest_configure(config: pytest.Config) -> None:
    # Without llvmlite `auto` falls back with a warning, and warnings of ours are errors: say that torch is meant.
    if available_backends()["cpu"] is not None:
        os.environ.setdefault("HEAR_SSAM_BACKEND", "torch")
    # Numbers are compared with those of this CPU; tests/test_gpu.py, which is asked for, compares both.
    if "HEAR_SSAM_TEST_GPU" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # No test leaves this machine or sees what its user has downloaded; those of downloads say otherwise.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HEAR_SSAM_CACHE"] = cache = tempfile.mkdtemp(prefix="hear-ssam-tests-")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


class _Serial:
    """A process pool that runs its jobs here and at once: to start a process takes seconds, a tiny job none."""

    def __init__(self, *_: object) -> None:
        jobs._opened.cache_clear()  # as in a new process

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: object) -> None:
        pass


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of `evaluate` run in this process."""
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", _Serial)


@pytest.fixture
def same_thread_count() -> Iterator[None]:
    threads = torch.get_num_threads()  # the command chooses it for its own process
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an encoder with one narrow block."""
    config = build_config("ssam", 16, depth=1)
    file = tmp_path_factory.mktemp("weights") / "mini.safetensors"
    save_checkpoint(file, config, Encoder(config).state_dict(), {})
    return file


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of private test material; skips the test where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no private test material at {SHARED} (set HEAR_SSAM_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Outputs of the official model classes on tiny random weights."""
    if not (shared / "golden").is_dir():
        pytest.skip(f"no golden numbers at {shared / 'golden'}")
    return shared / "golden"


@pytest.fixture(scope="session")
def tools_bin() -> Path:
    """The bin folder of an environment with the tools: this one's packages (torch) below, the tools above.

    Kept between runs, in HEAR_SSAM_TOOLS_ENV or `.venv-tools` of the checkout.
    """
    env = Path(os.environ.get("HEAR_SSAM_TOOLS_ENV", ROOT / ".venv-tools")).absolute()
    recipe = env / "recipe.txt"
    parent = sysconfig.get_path("purelib")
    wanted = "\n".join([parent, *INSTALL])
    if not recipe.is_file() or recipe.read_text() != wanted:
        shutil.rmtree(env, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
        (site,) = env.glob("lib/python*/site-packages")
        (site / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
        for line in INSTALL:
            subprocess.run([env / "bin/python", "-m", *shlex.split(line), "-q"], check=True)
        recipe.write_text(wanted)
    return env / "bin"
