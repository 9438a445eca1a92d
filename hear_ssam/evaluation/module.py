"""A module with the HEAR API, from anywhere: imported, loaded, called, and blamed for what goes wrong in it.

An encoder is seen through the HEAR API alone: `load_model`, `get_scene_embeddings`, `get_timestamp_embeddings` and
the attributes `sample_rate`, `scene_embedding_size`, `timestamp_embedding_size`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from modulefinder import ModuleFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..errors import HearSsamError
from ..options import parse_options, pick_device
from ..paths import sha256

ADAPTERS = ("hf", "xares")  # modules beside this one with the HEAR API, for models of other kinds


@dataclasses.dataclass(frozen=True)
class JudgedModule:
    """A loaded model of any module with the HEAR API."""

    module: ModuleType
    model: torch.nn.Module
    name: str  # names a model in records: the module (or the model's own name) and its options
    checkpoint_sha256: str
    device: torch.device
    source: dict[str, str]  # which one of its name it is, as it was loaded: version, SHA-256 of code, of untold weights

    @property
    def sample_rate(self) -> int:
        return int(getattr(self.model, "sample_rate"))  # noqa: B009

    def size(self, kind: str) -> int:
        """What the model promises as the width of its scene or timestamp embeddings."""
        return int(getattr(self.model, f"{kind}_embedding_size"))

    def embed(self, kind: str, audio: np.ndarray, clips: str) -> tuple[np.ndarray, np.ndarray]:
        """Scene (n, size) or timestamp (n, rows, size) embeddings of audio (n, samples), float32, and ms (n, rows).

        A scene embedding has the timestamp 0. Raises HearSsamError that names the function and the `clips` where the
        module raises something or returns no numbers, no frames or another shape.
        """
        function, size = f"{self.module.__name__}.get_{kind}_embeddings", self.size(kind)
        expected: tuple[int, ...] = (len(audio),)
        with blamed(f"{function} failed for {clips}"), torch.no_grad():
            given = torch.from_numpy(audio).to(self.device)
            returned = getattr(self.module, f"get_{kind}_embeddings")(given, self.model)
        if kind == "scene":
            embedded, times = as_array(returned, function), np.zeros((len(audio), 1), np.float32)
        elif isinstance(returned, tuple | list) and len(returned) == 2:
            embedded, times = (as_array(part, function) for part in returned)
            expected = (len(audio), *times.shape[-1:])
        else:
            raise HearSsamError(f"{function} must return a pair, embeddings and timestamps.")
        if embedded.shape != (*expected, size) or (kind != "scene" and times.shape != expected):
            shapes = f"{embedded.shape}" if kind == "scene" else f"{embedded.shape} and timestamps {times.shape}"
            wanted = f"expected {(*expected, size)} with {kind}_embedding_size={size}"
            raise HearSsamError(f"{function} returned embeddings {shapes} for {clips}; {wanted}.")
        if not embedded.size:
            raise HearSsamError(f"{function} returned no frames for {clips}; it must pad short clips.")
        return embedded.astype(np.float32, copy=False), times


@functools.cache
def _code_sha256(module: ModuleType, file: Path) -> str:
    """Over the file of a module and those that it imports from where it lies; of what is installed, whose version tells
    the rest, over the file alone. Once in a process, which goes on with what it has imported."""
    name, file = module.__name__, file.resolve()
    folder, files = file.parents[name.count(".") + (file.stem == "__init__")], {str(file)}
    if not {"site-packages", "dist-packages"} & set(folder.parts):
        finder = ModuleFinder([str(folder)], excludes=[__name__.partition(".")[0]])
        with contextlib.suppress(Exception):  # it is not found there
            finder.import_hook(name)
        files.update(filter(None, (getattr(one, "__file__", None) for one in finder.modules.values())))
    several = hashlib.sha256("".join(map(sha256, sorted(files))).encode())
    return several.hexdigest() if len(files) > 1 else sha256(file)


def as_array(returned: object, function: str) -> np.ndarray:
    """A tensor of any kind and device, or an array, as a NumPy array; bfloat16, which NumPy lacks, as float32."""
    if isinstance(returned, torch.Tensor):
        with blamed(f"{function} returned a tensor that cannot be read"):
            returned = returned.detach().to("cpu").resolve_neg()
            returned = (returned.float() if returned.dtype == torch.bfloat16 else returned).numpy()
    if not isinstance(returned, np.ndarray):
        raise HearSsamError(f"{function} returned a {type(returned).__name__}; the HEAR API asks for a torch.Tensor.")
    if returned.dtype.kind not in "fiu":
        raise HearSsamError(f"{function} returned numbers of type {returned.dtype}; the HEAR API asks for float32.")
    return returned


def load_hear_model(
    module: object, model: str = "", options: Mapping[str, Any] | None = None, device: str = "auto"
) -> JudgedModule:
    """Import `module`, call its `load_model([model], **options)`, move the model to `device` (see `options`).

    `module` may carry options of its own: 'hear_ssam:{"model": "logmel"}'. `hf:NAME` and `xares:FILE.py` name models of
    transformers and X-ARES, with options behind: 'hf:NAME:{"layer": 6}'. What is no name is `judged` as it is.
    Raises HearSsamError for a module that cannot be imported, ends the process, or lacks a part of the HEAR API.
    """
    if isinstance(module, ModuleType):
        module = module.__name__
    if not isinstance(module, str):
        return judged(module, device)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a module in the current folder can be judged too
    place = pick_device(device)
    name, _, own_options = module.partition(":")
    called = module if name in ADAPTERS else f"{name}.load_model"
    if name in ADAPTERS:
        weights, brace, own_options = own_options.partition(":{")
        own_options = brace[1:] + own_options
        if model:
            raise HearSsamError(f"--model {model}: of no use with {name}:{weights}, which names its weights itself.")
        name, model = f"{__package__}.{name}", weights
    options = {**(options or {}), **parse_options(own_options or "{}")}
    with blamed(f"cannot import the HEAR module {name!r}"):
        imported = importlib.import_module(name)
    for function in ("load_model", "get_scene_embeddings", "get_timestamp_embeddings"):
        if not callable(getattr(imported, function, None)):
            raise HearSsamError(f"the module {name} has no function {function}; the HEAR API needs it.")
    with blamed(f"{called} failed"):
        loaded = imported.load_model(*([model] if model else []), **options)
    own_name = getattr(loaded, "name", None)
    if isinstance(own_name, str):
        options.pop("model", None)  # said by the name already
    else:
        own_name = imported.__name__
    digest = getattr(loaded, "checkpoint_sha256", None)
    if digest is None:
        digest = sha256(model) if model and Path(model).is_file() else ""
        if model and not digest:  # a folder, or a name that the module knows
            options["weights"] = model
    full_name = "-".join([own_name, *(f"{key}={_shown(value)}" for key, value in sorted(options.items()))])
    return _placed(imported, loaded, full_name, str(digest), place)


def judged(model: object, device: str = "auto", digest: str = "") -> JudgedModule:
    """A loaded model as one to judge: of any HEAR module, an encoder of X-ARES, or a pair (model, feature extractor)
    of transformers. What it is called in records is its `name`, or its class; two of one name are told apart by
    `object_sha256`, or the `digest` that it had where it comes from.

    Raises HearSsamError for an object of another kind.
    """
    place, kind = pick_device(device), type(model)
    if isinstance(model, torch.nn.Module):
        model.eval()  # in the middle of a training, its dropout would decide
    for adapter in ADAPTERS:
        module = importlib.import_module(f".{adapter}", __package__)
        if (wrapped := module.wrap(model)) is not None:
            return _placed(module, wrapped, wrapped.name, digest or wrapped.checkpoint_sha256, place)
    parts = kind.__module__.split(".")
    packages = [sys.modules.get(".".join(parts[:depth])) for depth in range(len(parts), 0, -1)]
    found = next((p for p in packages if p and hasattr(p, "get_scene_embeddings")), None)
    if found is None:
        kinds = "a model of a HEAR module, an X-ARES encoder, a pair (transformers model, feature extractor)"
        raise HearSsamError(f"{kind.__name__}: cannot be judged; give {kinds}, or a list of them.")
    name = str(getattr(model, "name", None) or kind.__name__)
    return _placed(found, model, name, digest or object_sha256(model), place)


@contextlib.contextmanager
def modes_kept(objects: Iterable[object]) -> Iterator[None]:
    """What of these is a torch module, or a pair with one, is in training mode afterwards where it was before."""
    given = [one for whole in objects for one in (whole if isinstance(whole, tuple) else (whole,))]
    modes = [(part, part.training) for one in given if isinstance(one, torch.nn.Module) for part in one.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over names and values of all parameters and buffers that a model saves; empty where it has none."""
    digest, state = hashlib.sha256(), model.state_dict()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest() if state else ""


def object_sha256(model: Any) -> str:
    """SHA-256 over the weights of a model as they are now, or of those that it holds, the source of its class, and the
    settings (plain values) of its parts."""
    held = (value for value in getattr(model, "__dict__", {}).values() if isinstance(value, torch.nn.Module))
    whole = model if isinstance(model, torch.nn.Module) else torch.nn.ModuleList(held)
    said = [weights_sha256(whole)]
    with contextlib.suppress(OSError, TypeError):  # it was made where no file or notebook tells
        said.append(inspect.getsource(type(model)))
    attributes = (sorted(getattr(part, "__dict__", {}).items()) for part in (model, *whole.modules()))
    for name, value in itertools.chain.from_iterable(attributes):
        with contextlib.suppress(TypeError, ValueError):  # what is not plain
            value = dataclasses.asdict(value) if hasattr(type(value), "__dataclass_fields__") else value
            said.append(json.dumps([name, value], sort_keys=True))
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _placed(module: ModuleType, model: object, name: str, digest: str, place: torch.device) -> JudgedModule:
    """A torch module with the attributes of the HEAR API on its device, else HearSsamError."""
    if not isinstance(model, torch.nn.Module):
        raise HearSsamError(f"{module.__name__}.load_model returned a {type(model).__name__}, not a torch.nn.Module.")
    for attribute in ("sample_rate", "scene_embedding_size", "timestamp_embedding_size"):
        value = getattr(model, attribute, None)
        if not isinstance(value, int) or value < 1:
            wanted = f"the attribute {attribute} (an int above 0, not {value!r}); the HEAR API asks for it"
            raise HearSsamError(f"the model of {module.__name__} needs {wanted}.")
    file, version = getattr(module, "__file__", None), getattr(module, "__version__", "")
    source = {"module": module.__name__, "module_version": version if isinstance(version, str) else ""}
    source["module_sha256"] = _code_sha256(module, Path(file)) if file and Path(file).is_file() else ""
    if not digest and not hasattr(model, "checkpoint_sha256"):  # weights that the module finds itself
        with contextlib.suppress(Exception):  # of a kind that cannot be read
            source |= {"weights_sha256": told} if (told := weights_sha256(model)) else {}
    with blamed(f"the model of {module.__name__} cannot be moved to the device {place}"):
        return JudgedModule(module, model.to(place), name, digest, place, source)


def _shown(value: object) -> str:
    """An option's value in a model's name: text that could be taken for another value has quotes."""
    odd = re.compile(r"True|False|None|[-+]?[\d.]+(e[-+]?\d+)?|[\"'{\[].*|.*=.*", re.DOTALL)
    return json.dumps(value) if isinstance(value, str) and odd.fullmatch(value) else str(value)


@contextlib.contextmanager
def blamed(what: str) -> Iterator[None]:
    """Whatever a foreign module raises, sys.exit included, becomes a HearSsamError that says where it was raised; the
    working folder stays what it was."""
    here = os.getcwd()
    try:
        yield
    except (HearSsamError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # some tools of HEAR raise such
        where = ""
        for frame in traceback.extract_tb(error.__traceback__):  # the last one that is neither ours nor the importer's
            if frame.filename[0] != "<" and frame.filename not in (__file__, importlib.__file__):
                where = f" ({frame.filename}, line {frame.lineno})"
        raise HearSsamError(f"{what}: {type(error).__name__}: {str(error).rstrip('.')}{where}.") from error
    finally:
        os.chdir(here)
