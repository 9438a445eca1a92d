"""Encoders of X-ARES as a HEAR module: `xares:FILE.py[:CLASS]`; options in JSON go to the class.

X-ARES asks for a torch module with `sampling_rate`, `output_dim` and `hop_size_in_ms` that maps audio (clips, samples)
to a tensor (clips, rows, output_dim). Scenes are the mean over rows, as X-ARES pools them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import HearSsamError, unknown_name
from ..paths import sha256
from .module import blamed, object_sha256, weights_sha256

_ATTRIBUTES = ("sampling_rate", "output_dim", "hop_size_in_ms")


class XaresEncoder(torch.nn.Module):
    """An encoder of X-ARES with the attributes of the HEAR API."""

    def __init__(self, encoder: Any, code: str) -> None:
        """`code`: a SHA-256 of what it was made of, beside its weights."""
        super().__init__()
        name = type(encoder).__name__
        for attribute in _ATTRIBUTES:
            if not isinstance(getattr(encoder, attribute, None), int | float):
                raise HearSsamError(f"xares:{name}: has no number {attribute}, which X-ARES asks for; add it.")
        self.encoder = encoder
        self.name = f"xares:{name}"
        weights = weights_sha256(encoder) if isinstance(encoder, torch.nn.Module) else ""
        self.checkpoint_sha256 = hashlib.sha256(f"{weights}{code}".encode()).hexdigest()
        self.sample_rate = int(encoder.sampling_rate)
        self.scene_embedding_size = self.timestamp_embedding_size = int(encoder.output_dim)
        self.eval()

    def forward(self, audio: Tensor) -> Tensor:
        """Audio (clips, samples) → (clips, rows, output_dim)."""
        rows = self.encoder(audio)
        if not isinstance(rows, Tensor) or rows.ndim != 3:
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise HearSsamError(f"{self.name}: returned {shape}; X-ARES asks for a tensor (clips, rows, output_dim).")
        return rows


def load_model(model_file_path: str = "", **options: Any) -> XaresEncoder:
    """The encoder class in a file of Python, which is run: FILE.py, or FILE.py:CLASS where it holds several.

    Raises HearSsamError for a file without such a class, or whatever it raises itself.
    """
    path, _, name = (model_file_path, "", "") if model_file_path.endswith(".py") else model_file_path.rpartition(":")
    file = Path(path)
    if not file.is_file():
        mend = "no such file; name a file of Python, as in xares:encoder.py:MyEncoder"
        raise HearSsamError(f"xares:{model_file_path}: {mend}.")
    spec = importlib.util.spec_from_file_location(f"xares_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with _own_imports(file) as code:
        sys.modules[spec.name] = module
        with blamed(f"{file}: cannot be imported"):
            spec.loader.exec_module(module)
        own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == spec.name}
        classes = {key: value for key, value in own.items() if isinstance(value, type) and key.endswith("Encoder")}
        if name and name not in own:
            raise HearSsamError(f"{file}: {unknown_name('encoder', name, classes or own)}")
        if not name and len(classes) != 1:
            found = ", ".join(sorted(classes)) or "none"
            mend = f"name one, as in xares:{file}:CLASS"
            raise HearSsamError(f"{file}: classes whose name ends in Encoder: {found}; {mend}.")
        made = own[name] if name else next(iter(classes.values()))
        with blamed(f"{file}: {made.__name__} cannot be made"):
            encoder = made(**options)
    return XaresEncoder(encoder, code)


@contextlib.contextmanager
def _own_imports(file: Path) -> Iterator[str]:
    """What a file imports is what lies beside it, as where Python runs it, whatever another encoder calls so. Yields
    a SHA-256 over all of these files: where one changes, it is another encoder."""
    folder, finder = str(file.resolve().parent), ModuleFinder(excludes=[__name__.partition(".")[0]])
    finder.path = [folder]
    with blamed(f"{file}: cannot be imported"):
        finder.run_script(str(file))
    files = {name: path for name, one in finder.modules.items() if (path := getattr(one, "__file__", None))}
    others = {name: sys.modules.pop(name) for name in files if name in sys.modules and name != "__main__"}
    sys.path.insert(0, folder)
    try:
        yield hashlib.sha256("".join(sha256(files[name]) for name in sorted(files)).encode()).hexdigest()
    finally:
        sys.modules.update(others)
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # for what is imported later


def wrap(model: object) -> XaresEncoder | None:
    """An object as a HEAR model, None where it is no encoder of X-ARES."""
    fits = not isinstance(model, type) and all(hasattr(model, attribute) for attribute in _ATTRIBUTES)
    return XaresEncoder(model, object_sha256(model)) if fits else None


def get_scene_embeddings(audio: Tensor, model: XaresEncoder) -> Tensor:
    """Audio (clips, samples) → (clips, output_dim)."""
    return model(audio).mean(1)  # type: ignore[no-any-return]


def get_timestamp_embeddings(audio: Tensor, model: XaresEncoder) -> tuple[Tensor, Tensor]:
    """Audio (clips, samples) → (clips, rows, output_dim), ms (clips, rows), up to the end of the audio."""
    rows, length = model(audio), 1000 * audio.shape[1] / model.sample_rate
    ms = (torch.arange(rows.shape[1]) + 0.5) * model.encoder.hop_size_in_ms
    inside = max(1, int((ms <= length).sum()))
    return rows[:, :inside], ms[:inside].clamp(max=length).expand(len(audio), -1)
