"""Weights on disk: nothing executes, every size is read off the shapes, every fault is named."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import io
import json
import os
import pickle
import shutil
import sys
import threading
import types
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hear_ssam import HearSsamError, checkpoint
from hear_ssam.checkpoint import METADATA, _official_name, convert, load_checkpoint, save_checkpoint
from hear_ssam.cli import main
from hear_ssam.config import SYSTEMS, EncoderConfig, build_config
from hear_ssam.encoder import Encoder
from hear_ssam.paths import shipped

SMALL: dict[str, dict[str, Any]] = {"ssamba": {"depth": 2, "window_frames": 128}}


def small_config(system: str, **overrides: Any) -> EncoderConfig:
    return build_config(system, 48, **{"depth": 1, **SMALL.get(system, {}), **overrides})


def weights(config: EncoderConfig) -> dict[str, torch.Tensor]:
    """Random values under our names."""
    torch.manual_seed(0)
    return {name: torch.randn_like(tensor) for name, tensor in Encoder(config).state_dict().items()}


def official_weights(config: EncoderConfig) -> dict[str, torch.Tensor]:
    """The same values as the published code stores them; that the names are right is what the goldens prove."""
    state = {}
    for name, tensor in weights(config).items():
        if name == "patch_embed.weight":
            sides = (config.patch_frames, config.patch_mels)
            tensor = tensor.unflatten(1, (1, *(reversed(sides) if config.system == "ssamba" else sides)))
        elif name.endswith("conv.weight"):
            tensor = tensor.unsqueeze(1)
        state[_official_name(config.system, name)] = tensor
    return state


def official_file(path: Path, state: dict[str, Any], args: Any = None, **options: Any) -> Path:
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 99, "scaler": {}, "args": args}, path, **options)
    return path


# ---------------------------------------------------------------------------------------------------- our files


@pytest.mark.parametrize("system", SYSTEMS)
def test_our_file_returns_what_was_saved(system: str, tmp_path: Path) -> None:
    config = small_config(system, token_order="official")
    state, info = weights(config), {"source": "a test", "licence": "CC0-1.0", "clips": 3}
    save_checkpoint(tmp_path / "a.safetensors", config, state, info)
    save_checkpoint(tmp_path / "b.safetensors", config, state, info)
    read_config, read_state, read_info = load_checkpoint(tmp_path / "a.safetensors")
    assert read_config == config
    assert read_state.keys() == state.keys()
    assert all(torch.equal(read_state[name], state[name]) for name in state)
    assert info.items() <= read_info.items()
    assert len(read_info["sha256"]) == 64
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_half_precision_is_widened(tmp_path: Path) -> None:
    config = small_config("ssam")
    state = {name: tensor.half() for name, tensor in weights(config).items()}
    save_checkpoint(tmp_path / "half.safetensors", config, state, {})
    _, read, _ = load_checkpoint(tmp_path / "half.safetensors")
    assert all(read[name].dtype == torch.float32 and torch.equal(read[name], state[name].float()) for name in state)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("No space left on device")

    config = small_config("ssam")
    (tmp_path / "a.safetensors").write_bytes(b"old")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(HearSsamError, match=r"a\.safetensors: cannot be written: No space left"):
        save_checkpoint(tmp_path / "a.safetensors", config, weights(config), {})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_files_have_anybodys_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").touch()
    monkeypatch.delattr(os, "umask")  # it is the process's: what one thread sets for a moment another takes for its own
    save_checkpoint(tmp_path / "a.safetensors", small_config("ssam"), weights(small_config("ssam")), {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_state_that_does_not_fit_is_not_saved(tmp_path: Path) -> None:
    config = small_config("ssam")
    state = weights(config)
    del state["norm.bias"]
    with pytest.raises(HearSsamError, match=r"missing keys: norm\.bias"):
        save_checkpoint(tmp_path / "a.safetensors", config, state, {})
    assert not list(tmp_path.iterdir())


def test_foreign_and_damaged_safetensors(tmp_path: Path) -> None:
    foreign, damaged = tmp_path / "foreign.safetensors", tmp_path / "damaged.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(HearSsamError, match=r"foreign\.safetensors: not a checkpoint of .* it holds weight, but"):
        load_checkpoint(foreign)
    for metadata, reason in (
        ("{", "damaged metadata"),
        ('{"config": 3, "info": {}}', "damaged metadata"),
        ('{"config": {}, "info": {}}', "incomplete config"),
        ('{"config": {"systen": "ssam"}, "info": {}}', "Did you mean 'system'"),
    ):
        save_file({"weight": torch.zeros(2)}, damaged, metadata={METADATA: metadata})
        with pytest.raises(HearSsamError, match=rf"damaged\.safetensors: .*{reason}"):
            load_checkpoint(damaged)


# ---------------------------------------------------------------------------------------------------- official files


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_official_files(system: str, prefix: str, zipped: bool, tmp_path: Path) -> None:
    config = small_config(system)
    state = {prefix + name: tensor for name, tensor in official_weights(config).items()}
    if system == "ssamba":
        state |= {f"{prefix}p_input_fdim": torch.tensor(128), f"{prefix}v.head.bias": torch.zeros(1000)}
    args = argparse.Namespace(lr=1e-4, config={"patch": (4, 16)})
    path = official_file(tmp_path / "a.pth", state, args, _use_new_zipfile_serialization=zipped)
    read, tensors, info = load_checkpoint(path)
    assert (read.system, read.embed_dim, read.depth, read.window_frames) == (
        system, 48, config.depth, config.window_frames,
    )  # fmt: skip
    assert read.token_order == "official"
    assert read.mask_position == ("after" if system == "ssamba" else "before")
    assert info["dropped"] == (["p_input_fdim", "v.head.bias"] if system == "ssamba" else [])
    assert info["epoch"] == 99
    expected = weights(config)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("system", SYSTEMS)
def test_sizes_are_read_off_the_shapes(system: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"depth": 4, "patch_frames": 8}
    if system == "ssamba":
        sizes |= {"patch_mels": 32, "norm": "rmsnorm", "paired": False}
    if system == "ssast":
        sizes |= {"expand": 3}
    else:
        sizes |= {"conv_kernel": 3, "expand": 1}
    if system == "axlstm":
        sizes |= {"num_heads": 2}
    if system in ("ssam", "ssamba"):
        sizes |= {"state_dim": 5}
    config = small_config(system, token_order="official", **sizes)
    if system != "ssamba":
        config = EncoderConfig.from_dict(config.to_dict() | {"mask_position": "before"})
    assert load_checkpoint(official_file(tmp_path / "a.pth", official_weights(config)))[0] == config


def test_heads_of_ssast_follow_the_width(tmp_path: Path) -> None:
    config = build_config("ssast", 256, depth=1)
    read, _, _ = load_checkpoint(official_file(tmp_path / "a.pth", official_weights(config)))
    assert read.num_heads == config.num_heads == 4


def test_a_folder_stands_for_its_last_epoch(tmp_path: Path) -> None:
    with pytest.raises(HearSsamError, match="logmel: has no weights"):
        checkpoint.find_weights("logmel")
    with pytest.raises(HearSsamError, match="no folder of weights"):
        load_checkpoint(tmp_path)
    shutil.copy(shipped("checkpoints") / "ssam_tiny.safetensors", tmp_path)  # as a training leaves it
    assert load_checkpoint(tmp_path)[0].embed_dim == 192
    shutil.copy(shipped("checkpoints") / "ssam_tiny.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(HearSsamError, match="nor one other"):
        load_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    state = official_weights(small_config("ssam"))
    for epoch in (9, 10, 2):
        state["cls_token"] = torch.full((1, 1, 48), float(epoch))
        official_file(tmp_path / "checkpoints" / f"checkpoint-{epoch}.pth", state)
    assert load_checkpoint(tmp_path)[1]["cls_token"][0, 0, 0] == 10


def test_ml_collections_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A pickled ConfigDict, made without the package: pickle only records where its class lies.
    name = "ml_collections.config_dict.config_dict"
    module = types.ModuleType(name)
    module.ConfigDict = type("ConfigDict", (), {"__module__": name})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for part in ("ml_collections", "ml_collections.config_dict", name):
            patch.setitem(sys.modules, part, module)
        config = module.ConfigDict()
        config._fields = {"depth": 12, "inner": module.ConfigDict()}
        path = official_file(tmp_path / "a.pth", official_weights(small_config("ssam")), argparse.Namespace(c=config))
    assert load_checkpoint(path)[0].system == "ssam"


@pytest.mark.parametrize("system", ["ssam", "ssast", "axlstm", "ssamba"])
def test_golden_files_convert_without_loss(system: str, golden: Path, tmp_path: Path) -> None:
    source = golden / f"{system}_mini_official.pth"
    config, state, info = load_checkpoint(source)
    assert (config.system, config.embed_dim, config.depth) == (system, 48, 4 if system == "ssamba" else 2)
    convert(source, tmp_path / "a.safetensors")
    again, read, read_info = load_checkpoint(tmp_path / "a.safetensors")
    assert again == config
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert read_info["source_sha256"] == info["sha256"] != read_info["sha256"]
    assert read_info["licence"] and system in read_info["source"]


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = official_weights(small_config("ssamba")) | {"v.head.weight": torch.zeros(1000, 48)}
    source = official_file(tmp_path / "ssamba_tiny_400.pth", state)
    assert main(["convert", str(source), str(tmp_path / "out.safetensors")]) == 0
    printed = capsys.readouterr().out
    assert "v.head.weight" in printed and "official" in printed and "BSD-3-Clause" in printed
    assert load_checkpoint(tmp_path / "out.safetensors")[2]["sha256"] in printed
    data = [{"name": "birds", "clips": 2, "hours": 0.1, "licence": "CC0"}]
    ours = {"source": "pre-trained by hear_ssam", "data": data, "training": {"clips_seen": 2}}
    save_checkpoint(tmp_path / "ours.safetensors", *load_checkpoint(tmp_path / "out.safetensors")[:2], ours)
    assert main(["convert", str(tmp_path / "ours.safetensors"), str(tmp_path / "again.safetensors")]) == 0
    assert "source        pre-trained by hear_ssam" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "again.safetensors")[2]["data"] == data
    assert main(["convert", str(tmp_path / "absent.pth"), str(tmp_path / "b.safetensors")]) == 2
    assert "absent.pth" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()
    assert main(["convert", str(source), str(source / "below_a_file.safetensors")]) == 2
    assert "cannot be written" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("system", SYSTEMS)
def test_our_own_state_dict_loads_as_torch_saves_it(system: str, tmp_path: Path) -> None:
    config = small_config(system, window_frames=64 if system == "ssamba" else 200, pooling="mean_std")
    state = Encoder(config).state_dict()
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    model = {f"encoder.{name}": tensor for name, tensor in state.items()}
    for content in (state, model, {"model": state}, {"state_dict": model, "epoch": 3}):
        torch.save(content, tmp_path / "a.pth")
        with pytest.warns(UserWarning, match=r"a\.pth: holds no config: .* last block, mean and deviation"):
            read, tensors, _ = load_checkpoint(tmp_path / "a.pth")
        assert read == config
        assert tensors.keys() == state.keys() and all(tensors[name].equal(state[name]) for name in state)
    save_file(model, tmp_path / "a.safetensors")  # without our metadata
    with pytest.warns(UserWarning, match="holds no config"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert load_checkpoint(tmp_path / "b.safetensors")[0] == config
    save_file(half, tmp_path / "c.safetensors")
    with pytest.warns(UserWarning, match="holds no config"):
        assert load_checkpoint(tmp_path / "c.safetensors")[0] == config
    save_checkpoint(tmp_path / "nan.safetensors", config, {**state, "norm.weight": state["norm.weight"] / 0}, {})
    with pytest.raises(
        HearSsamError, match=r"nan\.safetensors: holds weights that are NaN or infinite \(norm\.weight\)"
    ):
        load_checkpoint(tmp_path / "nan.safetensors")


def test_a_state_dict_has_the_config_beside_it(tmp_path: Path) -> None:
    """As transformers writes both, with or without safetensors."""
    config = small_config("ssam", pooling="mean", readout_block=1, patch_frames=8, patch_mels=8)
    (tmp_path / "config.json").write_text(json.dumps({"encoder": config.to_dict()}))
    torch.save(Encoder(config).state_dict(), tmp_path / "pytorch_model.bin")
    assert load_checkpoint(tmp_path / "pytorch_model.bin")[0] == config  # and nothing warns
    for beside in ("{", "{}", json.dumps({"encoder": small_config("ssam", depth=2).to_dict()})):  # of something else
        (tmp_path / "config.json").write_text(beside)
        torch.save(Encoder(small_config("ssam")).state_dict(), tmp_path / "other.pth")
        with pytest.warns(UserWarning, match="holds no config"):
            load_checkpoint(tmp_path / "other.pth")


def test_patches_that_shapes_do_not_tell_apart(tmp_path: Path) -> None:
    sizes = (8, 16), (8, 8)
    tall, flat = (small_config("ssam", patch_frames=x, patch_mels=y, pooling="mean_std") for x, y in sizes)
    torch.save(Encoder(tall).state_dict(), tmp_path / "tall.pth")
    with pytest.warns(UserWarning, match="holds no config"):
        assert load_checkpoint(tmp_path / "tall.pth")[0] == tall
    torch.save(Encoder(flat).state_dict(), tmp_path / "flat.pth")  # as many pixels, as many patches as 4 x 16
    with pytest.raises(
        HearSsamError, match=r"flat\.pth: its positions are not those of 4 x 16 patches; .*save_checkpoint"
    ):
        load_checkpoint(tmp_path / "flat.pth")


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("system", ["ssam", "ssamba"])
def test_wrapped_weights(system: str, tmp_path: Path) -> None:
    """As DataParallel, torch.compile, FSDP, Lightning and averaging leave them: the weights, not the average."""
    state = official_weights(small_config(system))
    average = {name: 2 * tensor for name, tensor in state.items()}
    inside = {name.replace(".0.", ".0._orig_mod."): tensor for name, tensor in state.items()}
    for content in (
        prefixed("_orig_mod.", state),
        prefixed("module._orig_mod.", state),
        prefixed("module.", state) | {"n_averaged": torch.tensor(3)},  # torch's AveragedModel
        prefixed("_orig_mod.module.", state),
        {"model": inside},
        {"model": prefixed("_fsdp_wrapped_module.", state)},
        {"module": state, "global_step": 3},
        {"model_state_dict": state, "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        {"state_dict": prefixed("model.", state) | {"loss.weight": torch.zeros(2)}, "pytorch-lightning_version": "2.4"},
        {"state_dict": prefixed("model.net.", state) | prefixed("ema_model.net.", average)},
        {"model": state, "model_ema": average},
        {"model_ema": average, "model": state},
        {"model": state, "ema": {"shadow": average}},
        {"state_dict": state, "state_dict_ema": average},
        prefixed("online_model.", state) | prefixed("ema_model.", average) | {"step": torch.tensor(3)},
        state | prefixed("ema.", average),
    ):
        torch.save(content, tmp_path / "a.pth")
        _, tensors, _ = load_checkpoint(tmp_path / "a.pth")
        expected = weights(small_config(system))
        assert tensors.keys() == expected.keys() and all(tensors[name].equal(expected[name]) for name in expected)


def test_an_average_alone_is_read_and_named(tmp_path: Path) -> None:
    state = official_weights(small_config("ssam"))
    torch.save({"ema": state, "step": 3}, tmp_path / "a.pth")
    _, tensors, info = load_checkpoint(tmp_path / "a.pth")
    assert tensors["cls_token"].equal(state["cls_token"]) and info["entry"] == "ema"


def test_two_models_in_a_file_are_not_guessed(tmp_path: Path) -> None:
    state = official_weights(small_config("ssam"))
    torch.save({"best": state, "last": state}, tmp_path / "a.pth")
    with pytest.raises(HearSsamError, match=r"a\.pth: holds several sets of weights \(best\., last\.\); save one"):
        load_checkpoint(tmp_path / "a.pth")


class Colour(enum.Enum):
    RED = 1


def test_what_lies_beside_weights_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attributes = type("EasyDict", (dict,), {"__module__": "easydict"})
    easydict = types.ModuleType("easydict")
    easydict.EasyDict = attributes  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "easydict", easydict)
    monkeypatch.setattr(Colour, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Colour", Colour, raising=False)
    settings = attributes(lr=3)
    settings.name = "a"
    counts: Any = collections.defaultdict(list)
    counts["loss"].append(np.float32(0.5))
    beside = {
        "scalar": np.float64(0.5), "array": np.arange(3), "path": Path("runs/a"), "pure": PurePosixPath("b"),
        "counts": counts, "deque": collections.deque([1, 2], maxlen=2), "args": argparse.Namespace(path=Path("c")),
        "when": datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc), "colour": Colour.RED, "sizes": {4, 16},
        "namespace": types.SimpleNamespace(a=1), "settings": settings, "step": functools.partial(dict, a=1),
        "slice": slice(3), "version": torch.torch_version.TorchVersion("2.6"),
    }  # fmt: skip
    state = official_weights(small_config("ssam"))
    for zipped in (True, False):
        torch.save({**beside, "model": state, **beside}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        monkeypatch.delitem(sys.modules, "easydict", raising=False)
        assert load_checkpoint(tmp_path / "a.pth")[1]["norm.weight"].equal(state["encoder_norm.weight"])
        monkeypatch.setitem(sys.modules, "easydict", easydict)


@pytest.mark.parametrize("block", [4000, 10**8])
def test_a_block_of_a_huge_number_is_refused_at_once(block: int, tmp_path: Path) -> None:
    state = official_weights(small_config("ssam"))
    path = official_file(tmp_path / "a.pth", state | {f"blocks.{block}.norm.weight": torch.zeros(48)})
    with pytest.raises(
        HearSsamError, match=rf"a\.pth: does not fit ssam of depth {block + 1}: it holds 2 blocks; fetch"
    ):
        load_checkpoint(path)
    values = small_config("ssam").to_dict() | {"depth": block}
    metadata = {METADATA: json.dumps({"config": values, "info": {}})}
    save_file(weights(small_config("ssam")), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(HearSsamError, match=rf"a\.safetensors: does not fit ssam of depth {block}: it holds 1 blocks"):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("field", ["embed_dim", "expand", "state_dim", "window_frames", "conv_kernel"])
def test_a_config_of_a_huge_size_is_refused_at_once(field: str, tmp_path: Path) -> None:
    values = small_config("ssam").to_dict() | {field: 4 * 10**9}
    metadata = {METADATA: json.dumps({"config": values, "info": {}})}
    save_file(weights(small_config("ssam")), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(HearSsamError, match=r"a\.safetensors: does not fit ssam with [\d,]+ in a row: it holds"):
        load_checkpoint(tmp_path / "a.safetensors")


# ---------------------------------------------------------------------------------------------------- hostile files


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["payload", "args", "namespace", "weight", "key"])
@pytest.mark.parametrize("function", ["system", "eval"])
def test_nothing_in_a_pickle_runs(
    zipped: bool, place: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "executed"
    calls = {"system": Call(os.system, f"touch {trace}"), "eval": Call(eval, f"open({str(trace)!r}, 'w')")}
    evil: Any = calls[function]
    state: dict[Any, Any] = official_weights(small_config("ssam"))
    payload: Any = {"model": state, "args": evil if place == "args" else argparse.Namespace(config=evil)}
    if place == "payload":
        payload = evil
    elif place == "weight":
        payload = {"model": state | {"norm.weight": evil}}
    elif place == "key":
        payload = {"model": state, evil: 1}
    torch.save(payload, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what people set to load old checkpoints
    name = rf"{os.system.__module__}\.system" if function == "system" else "eval"
    with pytest.raises(HearSsamError, match=rf"evil\.pth: refused: .*{name}.*Nothing was executed"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not trace.exists()
    # The attack itself is real: plain pickle runs it.
    pickle.loads(pickle.dumps(evil))
    assert trace.exists()


def test_a_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(HearSsamError, match=r"module\.pth: refused: .*torch\.nn\.modules\.linear\.Linear"):
        load_checkpoint(tmp_path / "module.pth")


def test_stand_ins_serve_parallel_loads_and_leave_nothing_behind(tmp_path: Path) -> None:
    path = official_file(tmp_path / "a.pth", official_weights(small_config("ssam")), argparse.Namespace(a=1))
    errors: list[Exception] = []
    before = {*torch.serialization.get_safe_globals()}

    def load() -> None:
        try:
            for _ in range(5):
                load_checkpoint(path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert {*torch.serialization.get_safe_globals()} == before


# ---------------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated(kind: str, share: float, tmp_path: Path) -> None:
    path, config = tmp_path / "cut", small_config("ssam")
    if kind == "safetensors":
        save_checkpoint(path, config, weights(config), {})
    else:
        official_file(path, official_weights(config), _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(HearSsamError, match=r"cut: damaged.*fetch it again"):
        load_checkpoint(path)


def test_wrong_files(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.savez(array, a=np.zeros(3))
    for content, reason in (
        (b"", "not a checkpoint"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "not a checkpoint"),
        (b"plain text, long enough to have a ninth byte", "not a checkpoint"),
        (array.getvalue(), "damaged, truncated or no checkpoint"),
        (pickle.dumps({"model": 3}, protocol=2), "damaged, truncated or no checkpoint"),
    ):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(HearSsamError, match=rf"file: {reason}"):
            load_checkpoint(tmp_path / "file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(HearSsamError, match=r"pipe: is a pipe or a device"):
            load_checkpoint(tmp_path / "pipe")
    with pytest.raises(HearSsamError, match=r"absent: no such file or folder"):
        load_checkpoint(tmp_path / "absent")


def test_payloads_that_hold_no_weights(tmp_path: Path) -> None:
    state: dict[Any, Any] = official_weights(small_config("ssam"))
    for payload, reason in (
        ([1, 2], "holds a list"),
        ({}, "not a checkpoint of .*no weights"),
        ({"model": [1]}, "not a checkpoint of .*it holds model, but no cls_token"),
        ({"model": {1: torch.zeros(2)}}, "not a checkpoint of .*it holds 1, but no cls_token"),
        ({"model": {"encoder.weight": torch.zeros(2)}}, r"not a checkpoint of .*encoder\.weight"),
        (state | {"norm": 3}, "'norm' is not a dense floating-point tensor"),
        (state | {"norm": torch.zeros(2, dtype=torch.int64)}, "'norm' is not a dense floating-point tensor"),
        (state | {"norm": torch.zeros(2).to_sparse()}, "'norm' is not a dense floating-point tensor"),
    ):
        torch.save(payload, tmp_path / "a.pth")
        with pytest.raises(HearSsamError, match=rf"a\.pth: .*{reason}"):
            load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("system", SYSTEMS)
def test_missing_unexpected_and_misshapen_keys_are_named(system: str, tmp_path: Path) -> None:
    good = official_weights(small_config(system))
    norm = _official_name(system, "norm.weight")
    for name, change, reason in (
        (norm, None, f"missing keys: {norm}"),
        ("extra.weight", torch.zeros(3), r"unexpected keys: extra\.weight"),
        (norm, torch.zeros(47), rf"inconsistent shapes: {norm} \(47,\) instead of \(48,\)"),
        (_official_name(system, "cls_token"), None, "cls_token"),
        (_official_name(system, "cls_token"), torch.zeros(1, 1, 64), "inconsistent shapes"),
        (_official_name(system, "pos_embed"), torch.zeros(1, 100, 48), "inconsistent shapes: .*pos_embed"),
        (_official_name(system, "pos_embed"), torch.zeros(3), "shapes"),
        (_official_name(system, "patch_embed.weight"), torch.zeros(48, 1, 7, 11), "shapes .*patch"),
        (_official_name(system, "patch_embed.weight"), torch.zeros(48, 64), "shapes"),
        (_official_name(system, "patch_embed.weight"), torch.zeros(48, 1, 4, 0), "shapes"),
    ):
        state = {key: tensor for key, tensor in good.items() if key != name}
        if change is not None:
            state[name] = change
        with pytest.raises(HearSsamError, match=rf"a\.pth: .*{reason}"):
            load_checkpoint(official_file(tmp_path / "a.pth", state))
