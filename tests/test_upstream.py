"""The file for X-ARES against its own checker, installed apart."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Python with this environment's packages below those of other projects."""
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
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'upstream'}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([python, *command], env=environment, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.tools
def test_xares_takes_the_encoder(apart):
    apart(["--no-deps xares==0.1.3", "loguru"], str(ROOT / "upstream" / "hear_ssam_encoder.py"))
