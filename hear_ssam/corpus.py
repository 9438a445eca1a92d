"""`hear-ssam corpus`: audio files, folders and tars → a store for pre-training.

Tars may be shards in WebDataset layout. `checkpoints/corpus.py` decodes what the shipped encoders were trained on.
"""

from __future__ import annotations

import argparse
import functools
import io
import lzma
import os
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from .audio import SUFFIXES, UNREAD, decode_audio, find_audio, read_audio, tell_left_out
from .errors import HearSsamError
from .machine import usable_cpus
from .paths import atomic_write, read_toml, shipped
from .pretraining.store import RATE, Clip, build_store, open_store


def audio_clips(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Clip]:
    """Clips of audio files, of folders (searched through) and of tars, compressed or not.

    The source of a clip is the first folder below what was named, else the name of what was named without suffix and
    shard number (speech-000017.tar: speech). A damaged tar gives the clips before the damage, then one that cannot be
    decoded, so that whoever reads them can go on and name it; so does a tar without audio.
    """
    for path in map(Path, paths):
        if path.is_file() and (TAR.search(path.name) or _is_tar(path)):
            yield from _tar_clips(path)
            continue
        for file in find_audio([path]):
            yield Clip(_source(path, file.relative_to(path)), str(file), functools.partial(read_audio, file, RATE))


TAR = re.compile(r"([-_.]?\d{3,})?\.(tar|tgz|tar\.\w+)$", re.IGNORECASE)  # with the number of a shard


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except Exception:  # a damaged archive raises what its codec does; reading it as audio names it
        return False


def _tar_clips(path: Path) -> Iterator[Clip]:
    problem, left_out = "holds no audio", Counter[str]()
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                inside = Path(*(part for part in Path(member.name).parts if part not in ("/", "..")))
                suffix = inside.suffix.lower()
                if not member.isfile() or any(part.startswith(".") for part in inside.parts):
                    continue
                if suffix in SUFFIXES:
                    name, data = f"{path}:{member.name}", io.BytesIO(cast(IO[bytes], tar.extractfile(member)).read())
                    yield Clip(_source(path, inside), name, functools.partial(decode_audio, data, name, RATE))
                    problem = ""
                left_out[suffix] += suffix in UNREAD  # beside audio, a shard is full of other files
            problem = problem or _problem_at_end(tar)
        tell_left_out(path, left_out)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        problem = f"cannot be read to its end as a tar ({error})"
    if problem:
        refusal = f"{path}: {problem}; get it again or leave it out."
        yield Clip(path.stem, str(path), functools.partial(_refuse, refusal))


def _problem_at_end(tar: tarfile.TarFile) -> str:
    """tarfile takes whatever is no header for the end of an archive; zeros until the end of the file are one."""
    file = cast(IO[bytes], tar.fileobj)
    file.seek(tar.offset)
    block = file.read(512)
    while block and not block.strip(b"\0"):
        if not (block := file.read(1 << 20)):
            return ""
    return f"is cut off, damaged or joined to another tar at byte {tar.offset:,}"


def _refuse(message: str) -> NoReturn:
    raise HearSsamError(message)


def _source(named: Path, below: Path) -> str:
    if len(below.parts) > 1:
        return below.parts[0]
    if named.is_dir():
        return named.name
    return (TAR.sub("", named.name) if TAR.search(named.name) else "") or named.stem


def recipe() -> dict[str, Any]:
    """The corpus of the shipped encoders (`checkpoints/corpus.toml`): `package`, `source` and `left_out` tables."""
    return read_toml(shipped("checkpoints") / "corpus.toml")


def _terms(name: str) -> dict[str, str]:
    for entry in recipe()["package"] + recipe()["source"]:
        if entry["name"] == name:
            return {"licence": entry["licence"], "attribution": entry["attribution"]}
    return {}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "corpus",
        help="audio for pre-training -> a store",
        description="Turn audio into a store that `hear-ssam pretrain` reads (16 kHz, 16 bits: 115 MB an hour).",
        epilog="""examples:
  hear-ssam corpus store --audio recordings/ more.tar shards/speech-{000000..000127}.tar
  hear-ssam corpus store --check-against tasks/ my-test-set.tar    no recording of an evaluation is trained on
  hear-ssam corpus store --audio decoded/       what `python checkpoints/corpus.py packages decoded` wrote

What the shipped encoders were trained on, with its licences: checkpoints/corpus.toml.""",
    )
    parser.add_argument("store", metavar="STORE", help="folder to write")
    parser.add_argument("--audio", nargs="+", metavar="PATH", help="audio files, folders, tars of them")
    parser.add_argument(
        "--check-against", nargs="+", default=[], metavar="PATH", help="leave out clips that sound like these (tasks)"
    )
    parser.add_argument("--workers", type=int, default=usable_cpus(), metavar="N", help="decoding threads")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 if a file was skipped."""
    from tqdm import tqdm

    if args.workers < 1:
        raise HearSsamError(f"--workers {args.workers}: needs at least one.")
    if not args.audio and not args.check_against:
        raise HearSsamError(f"{args.store}: name what to do, --audio PATH... or --check-against PATH...")
    if not args.audio:
        return _check(args)
    info = build_store(args.store, tqdm(audio_clips(args.audio), unit=" clips"), args.workers, _terms)
    for row in info["sources"]:
        print(f"{row['clips']:8,} clips {row['hours']:8.2f} h  {row['name']}  {row.get('licence', '')}")
    print(f"{info['clips']:8,} clips {info['samples'] / RATE / 3600:8.2f} h  in {args.store}")
    print(f"dropped: {info['short']} under 25 ms, {info['silent']} silent, {info['repeated']} that repeat another")
    for reason in info["skipped"]:
        print(f"skipped {reason}", file=sys.stderr)
    if args.check_against:
        _check(args)
    return 1 if info["skipped"] else 0


def _check(args: argparse.Namespace) -> int:
    """Write and print which clips of a store are recordings of an evaluation; training leaves them out."""
    from tqdm import tqdm

    from .pretraining.leaks import find_leaks

    store = open_store(args.store)
    known = tqdm(audio_clips(args.check_against), unit=" clips")
    leaks = find_leaks(store, known, workers=args.workers)
    with atomic_write(store.folder / "left-out.tsv") as path:
        path.write_text("".join(f"{x.clip}\t{store.name(x.clip)}\t{x.known}\t{x.votes}\n" for x in leaks), "utf-8")
    for leak in leaks:
        print(f"left out: {store.name(leak.clip)} sounds like {leak.known} ({leak.votes} votes)")
    print(f"{len(leaks)} of {len(store)} clips are left out of training: {store.folder}/left-out.tsv")
    return 0
