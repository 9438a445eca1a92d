"""Weights on disk: our safetensors with the config inside, and the official `.pth` files of the four systems.

Nothing in a file is executed. `.pth` files are pickles that hold, beside the weights, whatever the training script
put there (arguments, paths, NumPy scalars): torch's restricted unpickler reads them, with stand-ins that keep nothing
for the classes of well-known packages. Any other class or function that a file names is refused by name.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import CONFIGS, EncoderConfig, build_config
from .download import cache_folder
from .encoder import Encoder, Undrawn, sincos_positions
from .errors import HearSsamError, said, unknown_name
from .hub.weights import OFFICIAL, PUBLISHED, here, hub_file, named, obtain
from .options import BASELINE
from .paths import atomic_write, sha256

# How messages about a file end.
_PASS = "pass weights as published, or the state dict of a model of this package."
_AGAIN = "fetch the file again."
MODEL = "model.safetensors"  # in a folder of Hugging Face's layout
METADATA = "hear_ssam"  # one safetensors entry: several would be written in random order, and the sha256 would vary


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[EncoderConfig, dict[str, Tensor], dict[str, Any]]:
    """Read weights: one of our files, an official `.pth` file or weights folder, or a state dict of either's names.

    A folder stands for its `model.safetensors`, for the highest-numbered `checkpoints/checkpoint-N.pth` in it, or for
    its only file of safetensors. The state dict may lie deeper in the file (`model`, Lightning's `state_dict`), under a
    common prefix, and beside an average of itself. Without a config in the file, all sizes are read off the shapes; how
    embeddings are made of tokens cannot be: official files are read as published, a state dict of ours as new weights,
    with a warning.

    Returns the config, the state dict for `Encoder(config)` (float32, CPU; stored half precision is widened) and an
    info dict: whatever the file tells about itself (source, licence, training facts, dropped keys) and the `sha256` of
    the file read.

    Raises HearSsamError that names the file, and the missing, unexpected or wrongly shaped keys or the refused class.
    """
    file = _find(Path(path))
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
        digest = sha256(file)
    except OSError as error:
        raise HearSsamError(f"{file}: cannot be read ({said(error)}); check its permissions.") from error
    try:
        if head[8:] == b"{":  # safetensors: the length of a JSON header, then the header
            config, state, info = _read_safetensors(file)
        elif head.startswith((b"PK\x03\x04", b"\x80")):  # a bare pickle is how torch saved before version 1.6
            config, state, info = _read_weights(_unpickle(file, zipped=head.startswith(b"PK")), file)
        else:
            raise HearSsamError("not a checkpoint; pass safetensors or a .pth file of torch.save.")
        if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise HearSsamError(f"holds weights that are NaN or infinite ({_some(broken)}); take an earlier state.")
    except HearSsamError as error:
        raise HearSsamError(f"{file}: {error}") from error.__cause__
    return config, state, {**info, "sha256": digest}


def find_weights(name: str, cache: str | os.PathLike[str] | None = None) -> tuple[Path, str]:
    """The file behind whatever names a model, fetched if need be, and what the model is to be called."""
    path, published = Path(name), named(name)
    if name == BASELINE:
        raise HearSsamError(f"{name}: has no weights; name an encoder.")
    if published and (published.downloadable or here(published, cache) or not path.exists()):
        return obtain(published, convert, cache), name
    if path.exists():
        return _find(path), path.stem if path.is_file() else os.path.basename(os.path.abspath(path))
    if path.name == name and path.suffix not in (".pth", ".pt", ".safetensors"):
        raise unknown_name("model", name, [*(entry.label for entry in PUBLISHED), *CONFIGS, BASELINE])
    repository = re.fullmatch(r"([\w.-]+/([\w.-]+))(?:@([\w./-]+))?", name)
    if not repository or path.parent.is_dir() or path.suffix in (".pth", ".pt", ".safetensors"):
        raise HearSsamError(f"{name}: no such file or folder; `hear-ssam models list` tells where weights are.")
    repo, called, revision = repository.groups()
    folder = cache_folder(cache) / "hub" / repo.replace("/", "--") / (revision or "main")
    return hub_file(repo, MODEL, revision, folder), called


def save_checkpoint(
    path: str | os.PathLike[str], config: EncoderConfig, state: Mapping[str, Tensor], info: Mapping[str, Any]
) -> None:
    """Write `state` of an `Encoder(config)`, in the dtypes given, as safetensors, atomically.

    `config` and `info` (JSON values only: source, licence, training facts) travel in the file's metadata.
    """
    _match_keys(config, state)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    facts = {key: value for key, value in info.items() if key != "sha256"}  # no file can hold its own
    metadata = json.dumps({"config": config.to_dict(), "info": facts}, sort_keys=True)
    with atomic_write(path, SafetensorError) as temporary:
        save_file(tensors, temporary, metadata={METADATA: metadata})


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in half precision: an embedding moves by less than 1e-3 of its size, the file is half as large."""
    matrix = {name for name, tensor in state.items() if tensor.dim() == 2 and name.endswith("weight")}
    return {name: tensor.half() if name in matrix else tensor for name, tensor in state.items()}


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], model: str = ""
) -> tuple[EncoderConfig, dict[str, Any]]:
    """Rewrite any readable checkpoint as our safetensors; returns the config and the info stored in `target`.

    Weights are kept in float32, so embeddings stay bit-identical. Raises HearSsamError where they are not of `model`.
    """
    config, state, info = load_checkpoint(source)
    wanted = CONFIGS[model] if model else config
    if any(getattr(config, size) != getattr(wanted, size) for size in ("system", "embed_dim", "depth")):
        found = f"{config.system} of width {config.embed_dim} and depth {config.depth}"
        raise HearSsamError(f"{source}: holds {found}, not {model}; take another file or name.")
    info = {"source_sha256": info.pop("sha256"), **info}
    save_checkpoint(target, config, state, info)
    return config, info


def _read_safetensors(file: Path) -> tuple[EncoderConfig, dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            state = {name: stream.get_tensor(name).to(torch.float32, copy=True) for name in stream.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise HearSsamError(f"damaged safetensors file ({said(error)}); delete it and fetch it again.") from error
    if METADATA not in metadata:
        return _read_weights(state, file)
    try:
        stored = json.loads(metadata[METADATA])
        config, info = EncoderConfig.from_dict(dict(stored["config"])), dict(stored["info"])
    except HearSsamError as error:
        raise HearSsamError(f"{error} Fetch the file again, or the version of hear_ssam that wrote it.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise HearSsamError(f"damaged metadata entry {METADATA!r} ({error!r}); fetch the file again.") from error
    _match_keys(config, state)
    return config, state, info


def _config_beside(file: Path, state: Mapping[str, Tensor]) -> EncoderConfig | None:
    """The config in the `config.json` beside weights that fit it: transformers writes both files."""
    try:
        config = EncoderConfig.from_dict(json.loads(file.with_name("config.json").read_text("utf-8"))["encoder"])
        _match_keys(config, state)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return config


# Our parameter names → the official ones, per system.
_YADAV = [(r"^patch_embed\.", "patch_embed.proj."), (r"^norm\.", "encoder_norm."), (r"^head\.", "pred.")]
_RENAMES: dict[str, list[tuple[str, str]]] = {
    "ssam": [*_YADAV, (r"\.conv\.", ".conv1d.")],
    "ssast": [
        *_YADAV, (r"\.attn\.(qkv|proj)\.", r".attn.\1_layer."),
        (r"\.mlp\.0\.", ".mlp.layer1."), (r"\.mlp\.2\.", ".mlp.layer2."),
    ],
    "axlstm": [*_YADAV, (r"\.conv\.", ".conv1d.conv."), (r"\.layer\.(igate|fgate|outnorm)", r".layer.mlstm_cell.\1")],
    "ssamba": [
        (r"^(cls_token|pos_embed)$", r"v.\1"), (r"^mask_token$", "mask_embed"),
        (r"^patch_embed\.", "v.patch_embed.proj."), (r"^norm\.", "v.norm_f."),
        (r"^contrast\.", "cpredlayer."), (r"^generate\.", "gpredlayer."),
        (r"^blocks\.", "v.layers."), (r"\.conv\.", ".conv1d."),
        (r"\.backward_\.A_log$", ".A_b_log"), (r"\.backward_\.(\w+)", r".\1_b"), (r"\.forward_\.", "."),
    ],
}  # fmt: skip
# A piece of a key that only this system has, most telling first.
_MARKS = {
    "ssamba": re.compile(r"v\.layers\.|\.forward_\."),
    "ssast": re.compile(r"\.attn\.qkv"),
    "axlstm": re.compile(r"\.layer\.proj_up\."),
    "ssam": re.compile(r"\.mixer\.A_log"),
}
_CONVOLUTION = re.compile(r"(patch_embed\.proj|conv1d(_b)?(\.conv)?)\.weight$")
# SSAMBA: two sizes, an ImageNet head; and the count of torch's AveragedModel
_UNUSED = ("p_input_fdim", "p_input_tdim", "v.head.weight", "v.head.bias", "n_averaged")


def _official_name(system: str, name: str) -> str:
    for pattern, replacement in _RENAMES[system]:
        name = re.sub(pattern, replacement, name)
    return name


_BLOCK = re.compile(r"(?:layers|blocks)\.(\d+)\.")
# What torch's wrappers put into names: DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPER = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ANCHOR = re.compile(r"(|.*?\.)(?:v\.)?cls_token")  # every model has one; what stands before it is the common prefix
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|teacher|shadow|averaged?)(?:[._]|$)", re.IGNORECASE)


def _weights_in(value: Any, path: str = "", depth: int = 3) -> dict[str, dict[str, Any]]:
    """Every set of named weights in nested dictionaries: where it lies, prefix included → its names without prefix."""
    if not isinstance(value, dict) or not depth:
        return {}
    names = {_WRAPPER.sub("", name): entry for name, entry in value.items() if isinstance(name, str)}
    prefixes = {match[1] for name in names if (match := _ANCHOR.fullmatch(name))}
    found: dict[str, dict[str, Any]] = {path + prefix: {} for prefix in prefixes}
    for name, entry in names.items():
        if fitting := [prefix for prefix in prefixes if name.startswith(prefix)]:
            prefix = max(fitting, key=len)
            found[path + prefix][name[len(prefix) :]] = entry
    for name, entry in value.items():
        found |= _weights_in(entry, f"{path}{name}.", depth - 1)
    return found


def _read_weights(payload: Any, file: Path) -> tuple[EncoderConfig, dict[str, Tensor], dict[str, Any]]:
    """The config, weights and facts of a state dict somewhere in `payload`, under official names or ours."""
    if not isinstance(payload, dict):
        raise HearSsamError(f"holds a {type(payload).__name__}, not a dictionary of weights; {_PASS}")
    found = _weights_in(payload)
    if len(found) > 1:  # the weights themselves, not an average of them
        found = {place: state for place, state in found.items() if not _AVERAGE.search(place)} or found
    if len(found) > 1 and "model." not in found:
        raise HearSsamError(f"holds several sets of weights ({_some(sorted(found))}); save one of them alone.")
    place = "model." if "model." in found else next(iter(found), "")
    state = found.get(place, {})
    system = next((system for system, mark in _MARKS.items() if any(mark.search(name) for name in state)), None)
    if system is None:
        weights = payload["model"] if isinstance(payload.get("model"), dict) else payload
        held = _some(state) or (f"{_some(map(str, weights))}, but no cls_token" if weights else "no weights at all")
        raise HearSsamError(f"not a checkpoint of {', '.join(sorted(_MARKS))}: it holds {held}; {_PASS}")
    dropped = [name for name in _UNUSED if state.pop(name, None) is not None]
    for name, tensor in state.items():
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided):
            raise HearSsamError(f"its entry {name!r} is not a dense floating-point tensor; {_PASS}")

    ours = "patch_embed.weight" in state
    stored = _config_beside(file, state) if ours else None
    if not stored:  # whose whitening is of a block that nothing names
        dropped += [name for name in ("whitening.center", "whitening.maps") if state.pop(name, None) is not None]
    rename: Callable[[str], str] = str if ours else functools.partial(_official_name, system)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    try:
        config = stored or _infer_config(system, shapes, rename)
    except KeyError as error:
        raise HearSsamError(f"an incomplete checkpoint of {system}: the key {error} is missing; {_AGAIN}") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise HearSsamError(f"a checkpoint of {system} with inconsistent shapes ({error}); {_AGAIN}") from error
    # Ours are a linear patch embedding and depthwise kernels; theirs Conv2d and Conv1d with one input channel.
    state = {name: tensor.flatten(1) if _CONVOLUTION.search(name) else tensor for name, tensor in state.items()}
    names = _match_keys(config, state, rename)
    state = {names[name]: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    info: dict[str, Any] = {"source": f"official {system} checkpoint {file.name}", "dropped": dropped}
    info["licence"] = f"{OFFICIAL[system].licence}, from {OFFICIAL[system].page}"
    if ours:
        info = {"source": f"state dict {file.name}"}
    if ours and not stored:
        rounded = functools.partial(torch.allclose, atol=4e-3)  # bfloat16 does so by 2e-3
        if config.positions == "sincos" and not rounded(state["pos_embed"], sincos_positions(config)):
            size = f"{config.patch_frames} x {config.patch_mels}"
            raise HearSsamError(f"its positions are not those of {size} patches; store the config, by save_checkpoint.")
        read = "embeddings are those of the last block, mean and deviation"
        warnings.warn(f"{file}: holds no config: {read}; save_pretrained keeps what a model has.", stacklevel=4)
    if place not in ("", "model."):
        info["entry"] = place.rstrip(".")
    if isinstance(payload.get("epoch"), int):
        info["epoch"] = payload["epoch"]
    return config, state, info


def _infer_config(system: str, shapes: Mapping[str, torch.Size], rename: Callable[[str], str]) -> EncoderConfig:
    """Every size, read off the shapes; what the shapes contradict among each other is found by `_match_keys`."""

    def shape(name: str) -> torch.Size:
        return shapes[rename(name)]

    width = shape("cls_token")[-1]
    sizes: dict[str, Any] = {"depth": 1 + max(int(index) for index in _BLOCK.findall(" ".join(shapes)))}
    if rename is str:  # ours: as many pixels, of patches as high as always
        sizes["patch_frames"], sizes["patch_mels"] = shape("patch_embed.weight")[1] // 16, 16
        sizes["pooling"] = "mean_std"
    else:
        patch = shape("patch_embed.weight")[2:]
        sizes["patch_frames"], sizes["patch_mels"] = reversed(patch) if system == "ssamba" else patch
        sizes["token_order"] = "official"
        if system != "ssamba":
            sizes["mask_position"] = "before"  # as released: masked patches carry no position
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
    if system == "ssamba" and rename("blocks.0.norm.bias") not in shapes:
        sizes["norm"], sizes["paired"] = "rmsnorm", False  # its users run the layers one after the other
    return build_config(system, width, **sizes)


# Packages whose classes lie beside weights (arguments, paths, NumPy scalars, trainers' own records); see _stand_in.
_HARMLESS = re.compile(
    r"(?:__main__|addict|argparse|attr|collections|copyreg|dataclasses|datetime|decimal|easydict|enum|fractions|functools"
    r"|hydra|lightning|lightning_fabric|lightning_utilities|ml_collections|numpy|omegaconf|pathlib|pytorch_lightning"
    r"|random|string|types|typing|uuid|yacs)\..+"
    r"|builtins\.(?:bool|bytes|dict|float|frozenset|int|list|object|range|slice|str|tuple|type)"
    r"|torch\.torch_version\.TorchVersion"
)


class _Inert:
    """What an object beside the weights becomes: it takes anything and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None: ...


def _stand_in(path: str) -> type:
    """An inert class that goes by the name of the class or function `path`, which is not even imported.

    The unpickler fills nothing but true dictionaries and lists, so that stand-ins for those make empty ones.
    """
    module, _, name = path.rpartition(".")
    content: dict[str, Any] = {"__module__": module, "__qualname__": name}
    if kind := OrderedDict if name.lower().endswith("dict") else list if name in ("deque", "list") else None:
        content["__new__"] = lambda cls, *args, **kwargs: kind()
    return type(name, (_Inert,), content)


_LOCK = threading.Lock()  # torch's list of stand-ins is process-wide


def _unpickle(file: Path, *, zipped: bool) -> Any:
    stand_ins: dict[str, Any] = {}
    while True:
        try:
            with _LOCK, torch.serialization.safe_globals([*stand_ins.values()]):
                # Mapped, so that an optimizer twice the size of the weights is never read.
                return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # a damaged or hostile pickle can raise anything
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if not (isinstance(error, pickle.UnpicklingError) and refused):
                reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
                raise HearSsamError(f"damaged, truncated or no checkpoint ({reason}); fetch it again.") from error
            path = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            if path in stand_ins or not _HARMLESS.fullmatch(path) or len(stand_ins) > 99:
                asked = f"refused: the file asks for {refused[1]}, which no checkpoint of weights needs."
                mend = "where you trust the file, load it by other means and save its state dict alone."
                raise HearSsamError(f"{asked} Nothing was executed; {mend}") from error
            stand_ins[path] = _stand_in(path)


def _find(path: Path) -> Path:
    if not path.exists():
        raise HearSsamError(f"{path}: no such file or folder; `hear-ssam models list` tells where weights are.")
    if path.is_file():
        return path
    if not path.is_dir():  # opening a pipe would wait, and a device may have no end
        raise HearSsamError(f"{path}: is a pipe or a device; pass a file of weights.")
    if (path / MODEL).is_file():
        return path / MODEL
    numbered = [file for file in path.glob("checkpoints/checkpoint-*.pth") if file.stem[11:].isdecimal()]
    if numbered:
        return max(numbered, key=lambda file: int(file.stem[11:]))
    trained = [*path.glob("*.safetensors")]  # what `hear-ssam pretrain` leaves
    if len(trained) == 1:
        return trained[0]
    wanted = f"neither {MODEL}, nor one other .safetensors, nor checkpoints/checkpoint-<number>.pth"
    raise HearSsamError(f"{path}: no folder of weights ({wanted} in it); pass the file itself.")


def _match_keys(
    config: EncoderConfig, state: Mapping[str, Tensor], rename: Callable[[str], str] = str
) -> dict[str, str]:
    """Compare `state` with what Encoder(config) holds under `rename`; returns the file's names → ours."""
    blocks = {match[1] for name in state if (match := _BLOCK.search(name))}
    if len(blocks) != config.depth:  # asked first: a config of a hundred million blocks takes hours to build
        depth = f"of depth {config.depth}: it holds {len(blocks)} blocks"
        raise HearSsamError(f"does not fit {config.system} {depth}; {_AGAIN}")
    c, most = config, max((size for tensor in state.values() for size in tensor.shape), default=0)
    widest = max(c.embed_dim, c.inner_dim, c.num_patches, c.patch_dim, c.state_dim, c.conv_kernel)
    if widest > 100 * most:  # nor is memory asked for that there is not
        raise HearSsamError(f"does not fit {c.system} with {widest:,} in a row: it holds {most:,} at most; {_AGAIN}")
    try:
        with torch.device("cpu"), Undrawn():
            ours = {rename(name): (name, tensor.shape) for name, tensor in Encoder(config).state_dict().items()}
    except (RuntimeError, MemoryError) as error:
        raise HearSsamError(f"does not fit {config.system}, which cannot be built: {error}; {_AGAIN}") from error
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
        size = f"width {config.embed_dim}, depth {config.depth}"
        raise HearSsamError(f"does not fit {config.system} ({size}): {found}; {_PASS}")
    return {name: own for name, (own, _) in ours.items()}


def _some(names: Iterable[str], limit: int = 6) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
