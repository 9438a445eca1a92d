"""Weights on disk: our safetensors with the config inside, and the official `.pth` files of the four systems.

Nothing in a file is executed. Official files are pickles that hold, beside the weights, the training arguments
(argparse.Namespace, ml_collections.ConfigDict): torch's restricted unpickler reads them, with stand-ins for those
classes that keep nothing. Any other class or function that a file names is refused by name.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import EncoderConfig, build_config
from .encoder import Encoder
from .errors import HearSsamError
from .paths import atomic_write, sha256

METADATA = "hear_ssam"  # one safetensors entry: several would be written in random order, and the sha256 would vary


class Origin(NamedTuple):
    """Where the official weights of a system are published, and under which licence."""

    licence: str
    hosting: str


OFFICIAL = {
    "ssam": Origin("MIT", "the Google Drive folder linked from github.com/SarthakYadav/audio-mamba-official"),
    "ssast": Origin("MIT", "the Google Drive folder linked from github.com/SarthakYadav/audio-mamba-official"),
    "axlstm": Origin(
        "MIT (but vision_lstm.py there: AGPL-3.0)",
        "the Google Drive folder linked from github.com/SarthakYadav/axlstm-official",
    ),
    "ssamba": Origin(
        "BSD-3-Clause (model card: bsd-3-clause-clear)",
        "huggingface.co/attentionisallyouneed369/ssamba or github.com/SiavashShams/ssamba",
    ),
}  # the licences of the repositories; no other is stated for the weights


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[EncoderConfig, dict[str, Tensor], dict[str, Any]]:
    """Read weights: one of our files, an official `.pth` file, or an official weights folder.

    A folder stands for the highest-numbered `checkpoints/checkpoint-N.pth` in it. Returns the config, the state dict
    for `Encoder(config)` (float32, CPU; stored half precision is widened) and an info dict: whatever the file tells
    about itself (source, licence, training facts, dropped keys) and the `sha256` of the file read.

    Raises HearSsamError that names the file and, where it applies, the missing, unexpected or wrongly shaped keys, or
    the refused class or function.
    """
    file = _find(Path(path))
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
        digest = sha256(file)
    except OSError as error:
        raise HearSsamError(f"cannot read the checkpoint {file}: {error.strerror or error}.") from error
    try:
        if head[8:] == b"{":  # safetensors: the length of a JSON header, then the header
            config, state, info = _read_ours(file)
        elif head.startswith(b"PK\x03\x04"):
            config, state, info = _read_official(file, zipped=True)
        elif head.startswith(b"\x80"):  # a bare pickle: how torch saved before version 1.6
            config, state, info = _read_official(file, zipped=False)
        else:
            raise HearSsamError("not a checkpoint (neither safetensors nor a .pth file of torch.save).")
    except HearSsamError as error:
        raise HearSsamError(f"{file}: {error}") from error.__cause__
    return config, state, {**info, "sha256": digest}


def save_checkpoint(
    path: str | os.PathLike[str], config: EncoderConfig, state: Mapping[str, Tensor], info: Mapping[str, Any]
) -> None:
    """Write `state` (of an `Encoder(config)`, in the dtypes given: half precision is fine) as safetensors, atomically.

    `config` and `info` (JSON values only: source, licence, training facts) travel in the file's metadata.
    """
    _match_keys(config, state)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    facts = {key: value for key, value in info.items() if key != "sha256"}  # no file can hold its own
    metadata = json.dumps({"config": config.to_dict(), "info": facts}, sort_keys=True)
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={METADATA: metadata})
        except SafetensorError as error:  # a full disk
            raise HearSsamError(f"cannot write {path}: {error}.") from error


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> tuple[EncoderConfig, dict[str, Any]]:
    """Rewrite any readable checkpoint as our safetensors; returns the config and the info stored in `target`.

    Weights are kept in float32, so embeddings stay bit-identical.
    """
    config, state, info = load_checkpoint(source)
    info = {"source_sha256": info.pop("sha256"), **info}
    save_checkpoint(target, config, state, info)
    return config, info


# ---------------------------------------------------------------------------------------------------- our files


def _read_ours(file: Path) -> tuple[EncoderConfig, dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            state = {name: stream.get_tensor(name).to(torch.float32, copy=True) for name in stream.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise HearSsamError(f"damaged or truncated safetensors file ({error}); fetch it again.") from error
    if METADATA not in metadata:
        raise HearSsamError("safetensors without a hear_ssam config; `hear-ssam convert` writes readable ones.")
    try:
        stored = json.loads(metadata[METADATA])
        values, info = dict(stored["config"]), dict(stored["info"])
    except (ValueError, TypeError, KeyError) as error:
        raise HearSsamError(f"damaged metadata entry {METADATA!r} ({error!r}); fetch the file again.") from error
    config = EncoderConfig.from_dict(values)
    _match_keys(config, state)
    return config, state, info


# ---------------------------------------------------------------------------------------------------- official files

# Our parameter names → the official ones, per system.
_YADAV = [(r"^patch_embed\.", "patch_embed.proj."), (r"^norm\.", "encoder_norm."), (r"^head\.", "pred.")]
_RENAMES: dict[str, list[tuple[str, str]]] = {
    "ssam": [*_YADAV, (r"\.conv\.", ".conv1d.")],
    "ssast": [
        *_YADAV,
        (r"\.attn\.(qkv|proj)\.", r".attn.\1_layer."),
        (r"\.mlp\.0\.", ".mlp.layer1."),
        (r"\.mlp\.2\.", ".mlp.layer2."),
    ],
    "axlstm": [
        *_YADAV,
        (r"\.conv\.", ".conv1d.conv."),
        (r"\.layer\.(igate|fgate|outnorm)\.", r".layer.mlstm_cell.\1."),
    ],
    "ssamba": [
        (r"^(cls_token|pos_embed)$", r"v.\1"),
        (r"^mask_token$", "mask_embed"),
        (r"^patch_embed\.", "v.patch_embed.proj."),
        (r"^norm\.", "v.norm_f."),
        (r"^contrast\.", "cpredlayer."),
        (r"^generate\.", "gpredlayer."),
        (r"^blocks\.", "v.layers."),
        (r"\.conv\.", ".conv1d."),
        (r"\.backward_\.A_log$", ".A_b_log"),
        (r"\.backward_\.(\w+)", r".\1_b"),
        (r"\.forward_\.", "."),
    ],
}
# A piece of a key that only this system has, most telling first.
_MARKS = {"ssamba": "v.layers.", "ssast": ".attn.qkv_layer.", "axlstm": ".layer.proj_up.", "ssam": ".mixer.A_log"}
_CONVOLUTION = re.compile(r"(patch_embed\.proj|conv1d(_b)?(\.conv)?)\.weight$")
_UNUSED = ("p_input_fdim", "p_input_tdim", "v.head.weight", "v.head.bias")  # SSAMBA: two sizes, an ImageNet head


def _official_name(system: str, name: str) -> str:
    for pattern, replacement in _RENAMES[system]:
        name = re.sub(pattern, replacement, name)
    return name


def _read_official(file: Path, *, zipped: bool) -> tuple[EncoderConfig, dict[str, Tensor], dict[str, Any]]:
    payload = _unpickle(file, zipped=zipped)
    if not isinstance(payload, dict):
        raise HearSsamError(f"holds a {type(payload).__name__}, not a dictionary of weights.")
    weights = payload.get("model", payload)
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise HearSsamError("its entry 'model' is not a dictionary of named weights.")
    state = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    dropped = [name for name in _UNUSED if state.pop(name, None) is not None]
    for name, tensor in state.items():
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided):
            raise HearSsamError(f"its entry {name!r} is not a dense floating-point tensor.")

    system = next((system for system, mark in _MARKS.items() if any(mark in name for name in state)), None)
    if system is None:
        found = _some(list(state)) or "no weights at all"
        raise HearSsamError(f"not a checkpoint of {', '.join(sorted(_MARKS))}: it holds {found}.")
    shapes = {name: tensor.shape for name, tensor in state.items()}
    try:
        config = _infer_config(system, shapes)
    except KeyError as error:
        raise HearSsamError(f"an incomplete checkpoint of {system}: the key {error} is missing.") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise HearSsamError(f"a checkpoint of {system} with inconsistent shapes ({error}).") from error
    # Ours are a linear patch embedding and depthwise kernels; theirs Conv2d and Conv1d with one input channel.
    state = {name: tensor.flatten(1) if _CONVOLUTION.search(name) else tensor for name, tensor in state.items()}
    names = _match_keys(config, state, lambda name: _official_name(system, name))
    info: dict[str, Any] = {
        "source": f"official {system} checkpoint {file.name}",
        "licence": f"{OFFICIAL[system].licence}, from {OFFICIAL[system].hosting}",
        "dropped": dropped,
    }
    if isinstance(payload.get("epoch"), int):
        info["epoch"] = payload["epoch"]
    return config, {names[name]: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}, info


def _infer_config(system: str, shapes: Mapping[str, torch.Size]) -> EncoderConfig:
    """Every size, read off the shapes; what the shapes contradict among each other is found by `_match_keys`."""

    def shape(name: str) -> torch.Size:
        return shapes[_official_name(system, name)]

    width = shape("cls_token")[-1]
    sizes: dict[str, Any] = {"token_order": "official"}
    sizes["depth"] = 1 + max(int(index) for index in re.findall(r"(?:layers|blocks)\.(\d+)\.", " ".join(shapes)))
    patch = shape("patch_embed.weight")[2:]
    sizes["patch_frames"], sizes["patch_mels"] = reversed(patch) if system == "ssamba" else patch
    bands = build_config(system, width).n_mels // sizes["patch_mels"]
    sizes["window_frames"] = (shape("pos_embed")[1] - 1) // bands * sizes["patch_frames"]
    if system == "ssast":
        sizes["expand"] = shape("blocks.0.mlp.0.weight")[0] // width
    elif system == "axlstm":
        sizes["expand"] = shape("blocks.0.layer.proj_up.weight")[0] // (2 * width)
        sizes["num_heads"] = shape("blocks.0.layer.igate.weight")[0]
        sizes["conv_kernel"] = shape("blocks.0.layer.conv.weight")[-1]
    else:
        mixer = "blocks.0.mixer.forward_." if system == "ssamba" else "blocks.0.mixer."
        inner, sizes["state_dim"] = shape(mixer + "A_log")
        sizes["expand"] = inner // width
        sizes["conv_kernel"] = shape(mixer + "conv.weight")[-1]
    if system != "ssamba":
        sizes["mask_position"] = "before"  # as released: masked patches carry no position
    elif _official_name(system, "blocks.0.norm.bias") not in shapes:
        sizes["norm"], sizes["paired"] = "rmsnorm", False  # its users run the layers one after the other
    return build_config(system, width, **sizes)


class _Inert:
    """What the pickled training arguments become: an object that takes anything and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


_STAND_INS: list[Any] = [
    type(name, (_Inert,), {"__module__": module, "__qualname__": name})
    for module, name in (
        ("argparse", "Namespace"),
        ("ml_collections.config_dict.config_dict", "ConfigDict"),
        ("ml_collections.config_dict.config_dict", "FrozenConfigDict"),
        ("ml_collections.config_dict.config_dict", "FieldReference"),
    )
]
_LOCK = threading.Lock()  # torch's list of stand-ins is process-wide


def _unpickle(file: Path, *, zipped: bool) -> Any:
    try:
        with _LOCK, torch.serialization.safe_globals(_STAND_INS):
            # Mapped, so that an optimizer twice the size of the weights is never read.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise HearSsamError(
                f"refused: the file asks for {refused[1]}, which no official checkpoint holds. Nothing was executed."
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HearSsamError(f"damaged, truncated or no checkpoint ({reason}); fetch it again.") from error


# ---------------------------------------------------------------------------------------------------- checks


def _find(path: Path) -> Path:
    if not path.exists():
        raise HearSsamError(f"no such checkpoint: {path}.")
    if not path.is_dir():
        return path
    numbered = {
        int(match[1]): file
        for file in (path / "checkpoints").glob("checkpoint-*.pth")
        if (match := re.fullmatch(r"checkpoint-(\d+)\.pth", file.name))
    }
    if not numbered:
        raise HearSsamError(f"{path} is no official weights folder: no checkpoints/checkpoint-<number>.pth in it.")
    return numbered[max(numbered)]


def _match_keys(
    config: EncoderConfig, state: Mapping[str, Tensor], rename: Callable[[str], str] = str
) -> dict[str, str]:
    """Compare `state` with what Encoder(config) holds under `rename`; returns the file's names → ours."""
    with torch.device("meta"):
        ours = {rename(name): (name, tensor.shape) for name, tensor in Encoder(config).state_dict().items()}
    problems = {
        "missing keys": [name for name in ours if name not in state],
        "unexpected keys": [name for name in state if name not in ours],
        "inconsistent shapes": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(ours[name][1])}"
            for name, tensor in state.items()
            if name in ours and tensor.shape != ours[name][1]
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {_some(entries)}" for kind, entries in problems.items() if entries)
        raise HearSsamError(f"does not fit {config.system} (width {config.embed_dim}, depth {config.depth}): {found}.")
    return {name: own for name, (own, _) in ours.items()}


def _some(names: Iterable[str], limit: int = 6) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
