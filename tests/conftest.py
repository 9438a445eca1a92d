"""The only place that knows where private test material lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("HEAR_SSAM_SHARED", Path(__file__).resolve().parent.parent.parent / "shared"))


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
