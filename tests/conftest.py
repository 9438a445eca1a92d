"""Where private test material lies (nothing else knows), and which scan backend the tests take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hear_ssam.scan import available_backends

SHARED = Path(os.environ.get("HEAR_SSAM_SHARED", Path(__file__).resolve().parent.parent.parent / "shared"))


def pytest_configure() -> None:
    # Without llvmlite `auto` falls back with a warning, and warnings of ours are errors: say that torch is meant.
    if available_backends()["cpu"] is not None:
        os.environ.setdefault("HEAR_SSAM_BACKEND", "torch")


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
