"""`hear-ssam heareval`: hear-validator and heareval, unmodified, on a current Python.

The tools date from 2021. What they miss today is supplied inside this process only, and only where it is missing:
a stand-in on the import path of every process would mislead packages that look for TensorFlow.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec

from .errors import HearSsamError

# Their own requirements (numpy 1.19.2, Python < 3.9, TensorFlow) do not resolve, hence --no-deps and the second line.
# pytorch-lightning 1.9.5 is the last with the hooks that heareval uses; it needs torchmetrics 1.x beside numpy 2.
INSTALL = (
    "pip install --no-deps --ignore-requires-python heareval==2021.1.3 hearvalidator==2021.0.6",
    "pip install pytorch-lightning==1.9.5 torchmetrics==1.9.0 sed_eval==0.2.1 intervaltree==3.2.1 torchinfo==1.8.0 "
    "python-slugify more-itertools click pandas nvidia-ml-py",
)

EXAMPLES = """examples:
  hear-ssam heareval validator hear_ssam
  hear-ssam heareval embeddings hear_ssam --tasks-dir tasks --model-options '{"model": "ssam_tiny"}'
  hear-ssam heareval predictions embeddings/hear_ssam-model=ssam-tiny/*
  hear-ssam heareval predictions --help             the tool's own options
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "heareval",
        help="run the unmodified hear-validator and heareval",
        description="Run the unmodified hear-validator 2021.0.6 and heareval 2021.1.3 on a current Python, without "
        "TensorFlow. The arguments go to the tool unchanged. To install the tools:\n\n  " + "\n  ".join(INSTALL),
        epilog=EXAMPLES,
    )
    parser.add_argument("tool", choices=TOOLS, help="check a HEAR module, compute its embeddings, or probe them")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the tool's own arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    module, repairs = TOOLS[args.tool]
    package = module.partition(".")[0]
    if not installed(package):
        raise HearSsamError(f"{package} is not installed. Install the HEAR tools:\n  " + "\n  ".join(INSTALL))
    for repair in repairs:
        repair()
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a module in the current folder can be judged
    sys.argv = [args.tool, *args.arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _stand_in(name: str, **contents: object) -> None:
    if not installed(name):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, loader=None)  # so that looking for it again does not fail
        vars(sys.modules[name]).update(contents)


def _tensorflow() -> None:
    # The tools ask whether a model is a tf.Module, and refuse a GPU that torch sees and TensorFlow does not.
    gpus = types.SimpleNamespace(is_gpu_available=lambda **_: True)
    _stand_in("tensorflow", Module=type("Module", (), {}), test=gpus)


def _pkg_resources() -> None:
    # pytorch-lightning declares a namespace package with it; setuptools 81 and later no longer bring it.
    _stand_in("pkg_resources", declare_namespace=lambda name: None)


def _trust_written() -> None:
    # heareval reads back checkpoints that it wrote itself a moment before; they hold classes and functions.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"


def _settable_epoch() -> None:
    # heareval assigns the best epoch before the test; since Lightning 1.6 that attribute is dead, and event tasks
    # look up their post-processing under the last epoch (KeyError).
    from pytorch_lightning.loops import FitLoop

    def set_epoch(loop: FitLoop, epoch: int) -> None:
        loop.epoch_progress.current.completed = epoch

    FitLoop.current_epoch = property(lambda loop: loop.epoch_progress.current.completed, set_epoch)


def _gpu_names() -> None:
    # heareval decodes the name of the GPU; NVML's bindings return str instead of bytes since 11.5.
    import torch

    if torch.cuda.is_available():
        import pynvml

        name_of = pynvml.nvmlDeviceGetName

        def encoded_name(handle: object) -> bytes:
            name = name_of(handle)
            return name.encode() if isinstance(name, str) else name

        pynvml.nvmlDeviceGetName = encoded_name


TOOLS: dict[str, tuple[str, tuple[Callable[[], None], ...]]] = {
    "validator": ("hearvalidator.validate", (_tensorflow,)),
    "embeddings": ("heareval.embeddings.runner", (_tensorflow, _gpu_names)),
    "predictions": ("heareval.predictions.runner", (_pkg_resources, _trust_written, _settable_epoch, _gpu_names)),
}
