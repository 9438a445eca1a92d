"""`hear-ssam corpus`: audio → a store; `hear-ssam codes`: targets; `hear-ssam pretrain`: an encoder and its model card.

One step: draw clips, hide a part of their patches, predict what the recipe asks about them, AdamW. What can differ is a
field of `Recipe`; the recipes that ship stand beside `pretraining/recipe.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .config import CONFIGS
from .errors import HearSsamError
from .machine import usable_cpus
from .options import add_device
from .paths import only_writer, shipped
from .pretraining.corpus import missing, recipe, terms
from .pretraining.recipe import RECIPES, Recipe, read_recipe


def _options() -> dict[str, Any]:
    """The recipe's fields that fit into one word."""
    return {name: kind for name, kind in get_type_hints(Recipe).items() if get_origin(kind) is not dict}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "corpus",
        help="audio for pre-training -> a store",
        description="Turn audio into a store that `hear-ssam pretrain` reads (16 kHz, 16 bits: 115 MB an hour).",
        epilog="""examples:
  hear-ssam corpus store --audio recordings/ more.tar shards/speech-{000000..000127}.tar
  hear-ssam corpus store --check-against tasks/ my-test-set.tar    no recording of an evaluation is trained on

What the shipped encoders were trained on (checkpoints/corpus.toml), from nothing, in an empty folder on Debian 12:
  hear-ssam corpus store --missing sources      prints commands: apt-get download ..., git fetch ... of a commit
  hear-ssam corpus store --missing sources | bash
  python .../checkpoints/corpus.py sources decoded    the path is printed when nothing is missing
  hear-ssam corpus store --audio decoded""",
    )
    parser.add_argument("store", metavar="STORE", help="folder to write")
    parser.add_argument("--audio", nargs="+", metavar="PATH", help="audio files, folders, tars of them")
    parser.add_argument("--check-against", nargs="+", metavar="PATH", help="leave out what sounds like these tasks")
    parser.add_argument("--missing", metavar="FOLDER", help="say what FOLDER lacks of the shipped encoders' corpus")
    parser.add_argument("--workers", type=int, default=usable_cpus(), metavar="N", help="decoding threads")
    parser.set_defaults(run=run_corpus)
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    parser = subparsers.add_parser(
        "pretrain",
        help="a store of audio -> an encoder",
        description="Masked pre-training. Saves its state as it goes; the same command resumes it.",
        epilog=f"""examples:
  hear-ssam corpus store --audio recordings/        make the store first
  hear-ssam pretrain store run
  hear-ssam pretrain store run --precision bf16 --batch-size 1024
  hear-ssam pretrain store more --init run/ssam_tiny.safetensors --seed 1    go on from weights
  hear-ssam pretrain store run --recipe my.toml --steps 1000    options win over the file
  hear-ssam pretrain store run --probe tasks/esc50-v2.0.0-full    judged while it trains; run/picture.png shows it
  torchrun --nproc-per-node 2 -m hear_ssam pretrain store run   several processes, on one machine or more
  hear-ssam embed sounds/ -o out.parquet --model run/ssam_tiny.safetensors

recipes that ship: {recipes}""",
    )
    parser.add_argument("store", metavar="STORE", help="folder that `hear-ssam corpus` wrote")
    parser.add_argument("out", metavar="OUT", help="folder of the run: its state, log, checkpoint and card")
    parser.add_argument("--recipe", metavar="FILE", help="TOML file with values for the options below, or a name")
    add_device(parser)
    parser.add_argument("--save-minutes", type=float, default=2.0, metavar="M", help="how often (default 2)")
    parser.add_argument("--keep", type=int, default=1, metavar="K", help="how many saved states stay (default 1)")
    parser.add_argument("--probe", nargs="+", metavar="TASK", help="HEAR tasks for logistic regression on embeddings")
    parser.add_argument("--probe-minutes", type=float, default=30.0, metavar="M", help="how often (default 30)")
    for name, kind in _options().items():
        option, default = f"--{name.replace('_', '-')}", f"default {getattr(Recipe, name)}"
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=default)
        elif choices := get_args(kind):
            parser.add_argument(option, choices=choices, help=default)
        else:
            parser.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=default)
    parser.set_defaults(run=run_pretrain)
    parser = subparsers.add_parser(
        "codes",
        help="a store and a teacher -> cluster codes for pre-training",
        description="Cluster what a teacher makes of a store: the targets of the objective `codes`.",
        epilog="""examples:
  hear-ssam codes store --checkpoint run/ssam_tiny.safetensors --block 8
  hear-ssam codes store --module some_hear_module --path weights.pt    any HEAR module is a teacher
  hear-ssam pretrain store run --recipe codes                          what they are for""",
    )
    parser.add_argument("store", metavar="STORE", help="folder that `hear-ssam corpus` wrote")
    parser.add_argument("--name", default="codes", help="of the files beside the store (default codes)")
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--checkpoint", metavar="NAME|FILE", help="a model of ours as the teacher")
    teacher.add_argument("--module", help="a HEAR module as the teacher, or what else `evaluate` takes")
    parser.add_argument("--block", type=int, help="after which a checkpoint's tokens are taken (default 8)")
    parser.add_argument("--path", help="a module's model_file_path")
    parser.add_argument("--student", choices=CONFIGS, metavar="MODEL", help="of a module's codes (default ssam_tiny)")
    parser.add_argument("--clusters", type=int, default=500, metavar="K", help="default 500")
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)
    parser.set_defaults(run=run_codes)


def run_corpus(args: argparse.Namespace) -> int:
    """`hear-ssam corpus`. Exit code 1 if a file was skipped."""
    from tqdm import tqdm

    from .audio import audio_clips
    from .pretraining.leaks import find_leaks
    from .pretraining.store import RATE, build_store, open_store

    if args.workers < 1:
        raise HearSsamError(f"--workers {args.workers}: needs at least one.")
    if args.missing and (args.audio or args.check_against):
        raise HearSsamError(f"--missing {args.missing}: only prints; use --audio and --check-against without it.")
    if args.missing:
        lines = missing(args.missing, recipe()["package"] + recipe()["source"])
        if not lines:
            command = shlex.join(["python", str(shipped("checkpoints") / "corpus.py"), args.missing, "AUDIO"])
            print(f"nothing is missing; go on with: {command}", file=sys.stderr)
        print(*lines, sep="\n")
        return 1 if lines else 0
    if not (args.audio or args.check_against):
        raise HearSsamError(f"{args.store}: name what to do: --audio, --check-against or --missing.")
    skipped: list[str] = []
    if args.audio:
        with only_writer(Path(args.store), "run of corpus"), tqdm(audio_clips(args.audio), unit=" clips") as clips:
            info = build_store(args.store, clips, args.workers, terms())
        for row in info["sources"]:
            print(f"{row['clips']:8,} clips {row['hours']:8.2f} h  {row['name']}  {row.get('licence', '')}")
        print(f"{info['clips']:8,} clips {info['samples'] / RATE / 3600:8.2f} h  in {args.store}")
        skipped = info["skipped"]
        dropped = f"{info['short']} under 25 ms, {info['silent']} silent, {info['repeated']} that repeat another"
        print(f"dropped: {dropped}, {len(skipped)} that cannot be read")
        for reason in skipped:
            print(f"skipped {reason}", file=sys.stderr)
    if args.check_against:  # training leaves out what is named here
        store = open_store(args.store)
        with only_writer(store.folder, "run of corpus"), tqdm(audio_clips(args.check_against), unit=" clips") as known:
            leaks = find_leaks(store, known, workers=args.workers)
            store.leave_out(leaks)
        for leak in leaks:
            print(f"left out: {store.name(leak.clip)} sounds like {leak.known} ({leak.votes} votes)")
        print(f"{len(store.left_out)} of {len(store)} clips are left out of training: {store.folder}/left-out.tsv")
    return 1 if skipped else 0


def run_pretrain(args: argparse.Namespace) -> int:
    """`hear-ssam pretrain`."""
    from .pretraining.loop import pretrain

    options = {name: value for name in _options() if (value := getattr(args, name)) is not None}
    recipe = read_recipe(args.recipe, **options) if args.recipe else Recipe(**options)
    probe = None
    if args.probe:
        from .evaluation.preview import logistic_scores, named_tasks

        probe = functools.partial(logistic_scores, tasks=named_tasks(args.probe), device=args.device)
    path = pretrain(args.store, args.out, recipe, args.device, args.save_minutes, args.keep, probe, args.probe_minutes)
    if int(os.environ.get("RANK", 0)) == 0:  # the others of torchrun's processes are done before
        last = json.loads((path.parent / "log.jsonl").read_text().splitlines()[-1])
        parts = ", ".join(f"{name[3:]} {value}" for name, value in last.items() if name.startswith("ms_"))
        print(f"wrote {path} and {path.with_suffix('.md')}; milliseconds a window: {parts}")
    return 0


def run_codes(args: argparse.Namespace) -> int:
    """`hear-ssam codes`."""
    from .evaluation.module import load_hear_model, weights_sha256
    from .pretraining.codes import build_codes, encoder_features, module_features
    from .pretraining.store import open_store

    for name in ("path", "student") if args.module is None else ("block",):
        if (value := getattr(args, name)) is not None:
            raise HearSsamError(f"--{name} {value}: says nothing about this teacher; leave it out.")
    store, config = open_store(args.store), CONFIGS[args.student or "ssam_tiny"]
    if args.module is None:
        block = 8 if args.block is None else args.block
        config, features, teacher = encoder_features(store, args.checkpoint, block, args.device)
    else:
        hear = load_hear_model(args.module, args.path or "", device=args.device)
        features = module_features(store, functools.partial(hear.embed, "timestamp"), hear.sample_rate, config)
        digest = hear.checkpoint_sha256 or weights_sha256(hear.model)
        teacher = {"name": hear.name, **hear.source, "model": Path(args.path or "").name, "sha256": digest}
    with only_writer(store.folder, "run of codes"):
        info = build_codes(store, args.name, config, features, teacher, args.clusters, args.seed)
    print(f"wrote {store.folder / args.name}.npy: {info['used']} of {info['clusters']} codes are used")
    return 0
