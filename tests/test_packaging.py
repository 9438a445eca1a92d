"""Wheel, sdist, editable install and checkout: one top-level name, and the shipped folders are found in each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import hear_ssam
from hear_ssam import __version__
from hear_ssam.paths import read_toml, shipped

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("checkpoints", "eval_tasks")
FIND = f"from hear_ssam.paths import shipped; [print(shipped(folder)) for folder in {FOLDERS}]"


def call(*command: str | Path, cwd: Path, path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of the checkout and the wheel made from that sdist, as an installer would."""
    folder = tmp_path_factory.mktemp("built")
    hatch = (sys.executable, "-m", "hatchling", "build", "-d", folder)
    call(*hatch, "-t", "sdist", cwd=ROOT)
    with tarfile.open(folder / f"hear_ssam-{__version__}.tar.gz") as sdist:
        sdist.extractall(folder, filter="data")
    call(*hatch, "-t", "wheel", cwd=folder / f"hear_ssam-{__version__}")
    return folder


def below(folder: Path) -> set[str]:
    """The files of a shipped folder, as it is in the checkout."""
    return {f"{folder.name}/{file.relative_to(folder).as_posix()}" for file in folder.rglob("*") if file.is_file()}


def test_wheel_has_one_top_level_name_and_carries_the_data(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"hear_ssam", f"hear_ssam-{__version__}.dist-info"}
    wanted = {f"hear_ssam/{name}" for name in below(shipped("eval_tasks"))}
    wanted |= {
        f"hear_ssam/checkpoints/{name}"
        for name in ("ssam_tiny.safetensors", "ssam_tiny.md", "corpus.py", "corpus.toml")
    }
    assert sum(name.endswith(".safetensors") for name in names) == 1  # other weights are downloaded
    wanted |= {file.relative_to(ROOT).as_posix() for file in (ROOT / "hear_ssam").rglob("*.py")}
    wanted |= {"hear_ssam/py.typed", "hear_ssam/evaluation/report.html.j2"}
    assert wanted <= set(names)


def test_sdist_holds_the_package_and_no_litter(built: Path) -> None:
    with tarfile.open(built / f"hear_ssam-{__version__}.tar.gz") as sdist:
        top = {Path(name).parts[1] for name in sdist.getnames()}
    needed = set("hear_ssam checkpoints eval_tasks tests setup.cfg pyproject.toml README.md".split())
    beside = set(".ci .gitignore LICENSE constraints.txt benchmarks".split())
    beside |= set("CONTRIBUTING.md CHANGELOG.md CITATION.cff PKG-INFO".split())
    assert needed <= top <= needed | beside


def test_checkout_finds_the_shipped_folders(tmp_path: Path) -> None:
    out = call(sys.executable, "-c", FIND, cwd=tmp_path, path=str(ROOT))
    assert out.split() == [str(ROOT / folder) for folder in FOLDERS]


def test_wheel_finds_the_shipped_folders(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    call(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    out = call(sys.executable, "-c", FIND, cwd=tmp_path, path=str(site))
    assert out.split() == [str(site / "hear_ssam" / folder) for folder in FOLDERS]
    assert f"hear-ssam {__version__}" in call(site / "bin/hear-ssam", "--version", cwd=tmp_path, path=str(site))


def test_editable_install_finds_the_shipped_folders(tmp_path: Path) -> None:
    env = tmp_path / "env"
    call(sys.executable, "-m", "venv", "--without-pip", env, cwd=tmp_path)
    (site,) = env.glob("lib/python*/site-packages")
    (site / "parent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # for hatchling and the dependencies
    options = ("-q", "--no-deps", "--no-build-isolation", "--ignore-installed", "--prefix", env)
    call(env / "bin/python", "-m", "pip", "install", *options, "-e", ROOT, cwd=tmp_path)
    out = call(env / "bin/python", "-c", FIND, cwd=tmp_path)
    assert out.split() == [str(ROOT / folder) for folder in FOLDERS]


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_extras_resolve_together(python: str) -> None:
    """Freely, and with the versions of constraints.txt, as the README's commands install them."""
    uv = shutil.which("uv") or shutil.which("uv", path=os.fspath(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("uv is not installed (pip install uv)")
    known = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    extras = sorted(known.keys() - {"cuda"})  # which needs nvcc
    command = [uv, "pip", "compile", "-q", "--python-version", python, "pyproject.toml"]
    command += [word for extra in extras for word in ("--extra", extra)]
    for pins in ((), ("-c", "constraints.txt")):
        done = subprocess.run([*command, *pins], cwd=ROOT, capture_output=True, text=True)
        if "error sending request" in done.stderr:
            pytest.skip("no network")
        assert done.returncode == 0, f"{' '.join(pins)}: {done.stderr}"


def test_the_package_root_shows_the_api_and_nothing_else() -> None:
    assert set(dir(hear_ssam)) == {*hear_ssam.__all__, "__version__"}
    assert all(callable(getattr(hear_ssam, name)) for name in hear_ssam.__all__)


def test_the_contents_page_names_every_module() -> None:
    package = ROOT / "hear_ssam"
    modules = {file.stem for file in package.rglob("*.py")} | {"scan", "pretraining", "evaluation", "hub"}
    listed = set(re.findall(r"\w+", hear_ssam.__doc__ or ""))
    assert modules - {"__init__", "__main__"} <= listed


def test_ci_runs_the_command_of_the_readme() -> None:
    command = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert "-m tests" in command and command in (ROOT / "README.md").read_text().splitlines()
