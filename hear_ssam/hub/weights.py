"""Published weights: where each lies, and how it comes here once.

A field is None where no source that could be read states it. Sources: the READMEs of
github.com/SarthakYadav/audio-mamba-official, github.com/SarthakYadav/axlstm-official and
github.com/SiavashShams/ssamba (papers, web drives, data, files named by the number of masked patches); issue 10 of the
last (its repository on Hugging Face); the LICENSE files of the three; the papers (data).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..download import cache_folder, check_hash, fetch, locked, offline
from ..errors import HearSsamError
from ..paths import shipped


@dataclass(frozen=True)
class Origin:
    """What a family of weights shares."""

    page: str  # where people find them
    licence: str | None
    paper: str | None
    trained_on: str | None


_DRIVE, _SSAMBA = "https://drive.google.com/drive/folders/", "attentionisallyouneed369/ssamba"
_SSAM = Origin(f"{_DRIVE}1l6_8e1TFEfnobwUMIbA7-aKw2FwlBhho", "MIT", "https://arxiv.org/abs/2406.02178", "AudioSet")
OFFICIAL = {  # by system; the licences are those of the repositories: none is stated for the weights
    "ssam": _SSAM,
    "ssast": _SSAM,
    "axlstm": Origin(
        f"{_DRIVE}1SyNvA7a6jrWmRwYYj85ggADiKBpDpGLK", "MIT (but vision_lstm.py there: AGPL-3.0)",
        "https://arxiv.org/abs/2408.16568", "AudioSet",
    ),
    "ssamba": Origin(
        f"https://huggingface.co/{_SSAMBA}", "BSD-3-Clause (model card: bsd-3-clause-clear)",
        "https://arxiv.org/abs/2405.11831", "AudioSet and LibriSpeech",
    ),
}  # fmt: skip
OURS = Origin("ships with hear_ssam", "Apache-2.0", None, "33 h of openly licensed audio: checkpoints/ssam_tiny.md")
EQUAL = Origin("checkpoints/ in a checkout of hear_ssam", "Apache-2.0", None, "the same audio: checkpoints/equal.md")


@dataclass(frozen=True)
class Weights:
    """One published set of weights."""

    name: str  # of the model
    tag: str  # tells weights of one model apart
    origin: Origin
    file: str | None = None  # below `hub`, or in checkpoints/
    hub: str | None = None  # repository on Hugging Face
    revision: str | None = None  # a commit of it
    url: str | None = None  # of the file, where it is not on the hub
    sha256: str | None = None
    size: int | None = None  # bytes

    @property
    def label(self) -> str:
        return f"{self.name}.{self.tag}"

    @property
    def downloadable(self) -> bool:
        return bool(self.hub or self.url)


_SHORT = {  # trained alike, to be compared: sha256, bytes
    "ssam": ("b69e556ad3414642c2074f0ad488c14750fcabcfc1a91d9dd89a4ecff1ea35f4", 10_121_272),
    "ssast": ("ec457a00031d698f83c75ef7c691ff8b43ecec04ac5225849017be436d06e840", 11_080_128),
    "axlstm": ("a53691172547e9ccc065e4a29e8b62292375f6deb4c2bd17fe2040a266d6fa1c", 6_199_184),
}
_SIZES = ("tiny", "small", "base")
_SHA256 = "3366232f328f906e22f8b45e6aba2a5ea3fa279b5b57652fd6eaba3f3aca4154"
PUBLISHED = [  # the first of a name is what the name alone means
    Weights("ssam_tiny", "open", OURS, "ssam_tiny.safetensors", sha256=_SHA256, size=10_430_808),
    *(Weights(f"{system}_{size}", "r1", OFFICIAL[system]) for system in ("ssam", "ssast", "axlstm") for size in _SIZES),
    *(
        Weights(f"ssamba_{size}", hidden, OFFICIAL["ssamba"], f"ssamba_{size}_{hidden}.pth", hub=_SSAMBA)
        for size in _SIZES
        for hidden in ("400", "300", "250")  # masked patches
    ),
    *(
        Weights(f"{system}_tiny", "equal", EQUAL, f"{system}_tiny_equal.safetensors", sha256=digest, size=size)
        for system, (digest, size) in _SHORT.items()
    ),
]


def named(name: str) -> Weights | None:
    """The weights that NAME or NAME.TAG means, if any."""
    return next((weights for weights in PUBLISHED if name in (weights.name, weights.label)), None)


def here(weights: Weights, cache: str | os.PathLike[str] | None = None) -> Path | None:
    """The file of ours with these weights, shipped or in the cache; None before they were fetched."""
    places = [_converted(weights, cache)]
    if weights.file and not weights.downloadable:
        places.insert(0, shipped("checkpoints") / weights.file)
    return next((place for place in places if place.is_file()), None)


def obtain(
    weights: Weights,
    convert: Callable[[Path, Path, str], object],
    cache: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
) -> Path:
    """The file of ours with these weights; where it is not here, fetched, checked and converted once.

    `convert(published, ours, model)` writes the file. `source`: a published file or folder that is on this machine.
    Raises HearSsamError as `download.fetch` does, and with the place where weights on a web drive are.
    """
    file, target = here(weights, cache), _converted(weights, cache)
    if file and not source:
        return file
    if file not in (None, target):
        raise HearSsamError(f"--from {source}: {weights.label} is here already, in {file}; name other weights.")
    if not source and not weights.downloadable:
        lie = f"no program can fetch these weights from {weights.origin.page}; use a browser"
        if weights.file:
            lie = f"{weights.file} lies in {weights.origin.page}, not in the package; get it there"
        keep = f"pass the file or folder, or keep it for good: hear-ssam models fetch {weights.label} --from PATH"
        raise HearSsamError(f"{weights.label}: {lie} and {keep}.")
    with locked(target):
        if source:
            if weights.sha256 and os.path.isfile(source):
                check_hash(Path(source), source, weights.sha256, target)
            convert(Path(source), target, weights.name)
        elif not target.is_file():  # another process may have made it meanwhile
            memory = target.with_name(weights.file or "")  # where a plain download lies, and what its hash is noted for
            noted = memory.with_name(f"{memory.name}.sha256")
            published, unknown = memory, not noted.is_file()
            if weights.hub:
                published = hub_file(weights.hub, memory.name, weights.revision, memory.parent, weights.sha256)
            else:
                fetch(weights.url or "", memory, weights.sha256)
            try:
                if published != memory:  # from the hub's client, which compares sizes only
                    check_hash(published, weights.label, weights.sha256, memory)
                convert(published, target, weights.name)
            except HearSsamError:  # another file, or no checkpoint but the page of a hotel's network, say
                for path in {published.resolve(), published, *([noted] if unknown else [])}:
                    path.unlink(missing_ok=True)  # or the hub's cache would give it again
                raise
            if published == memory:
                published.unlink()
    return target


def hub_file(repo: str, file: str, revision: str | None, folder: Path, pinned: str | None = None) -> Path:
    """A file of a repository on Hugging Face (or HF_ENDPOINT): in the hub's own cache, or in `folder` where
    huggingface_hub is not installed. Raises HearSsamError where it cannot be had."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        fetch(f"{endpoint.rstrip('/')}/{repo}/resolve/{revision or 'main'}/{file}", folder / file, pinned)
        return folder / file
    try:
        return Path(hf_hub_download(repo, file, revision=revision, library_name="hear-ssam"))
    except Exception as error:  # the network's, the hub's, the disk's: of many classes
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        mend = "unset HF_HUB_OFFLINE to download it" if offline() else "check the name, the network and the disk"
        raise HearSsamError(f"{repo}/{file}: cannot be had from the hub: {reason}; {mend}.") from error


def _converted(weights: Weights, cache: str | os.PathLike[str] | None) -> Path:
    return cache_folder(cache) / f"{weights.label}.safetensors"
