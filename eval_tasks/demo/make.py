"""Makes the demo task again from three Debian packages, each extracted with `dpkg -x` to FOLDER/NAME.

    python eval_tasks/demo/make.py FOLDER

The task: which kind of sound is this? Clips of one second in 11 classes, five folds. A recording lies in one fold only,
however many clips are cut from it.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from hear_ssam.audio import read_audio

RATE = 16_000
FOLDS = [f"fold{i:02d}" for i in range(5)]
TASK = Path(__file__).parent / "tasks" / "sound_kinds-v1.0-full"
CLIPS_OF_ONE = 3  # cut from one long recording at most

# Recordings of sonic-pi-samples by class; "a+b" are takes of one thing and stay in one fold.
SONIC_PI = {
    "ambience": """ambi_choir ambi_dark_woosh ambi_drone ambi_glass_hum ambi_glass_rub ambi_haunted_hum ambi_lunar_land
        ambi_soft_buzz ambi_swoosh vinyl_hiss""",
    "bass": """bass_dnb_f bass_drop_c bass_hard_c bass_hit_c bass_thick_c bass_trance_c bass_voxy_c+bass_voxy_hit_c
        bass_woodsy_c""",
    "beat": "loop_amen+loop_amen_full loop_breakbeat loop_compus loop_garzul loop_industrial loop_mika loop_safari",
    "blip": """elec_beep elec_bell elec_blip+elec_blip2 elec_blup elec_bong elec_chime elec_flip elec_ping elec_plip
        elec_pop elec_tick elec_triangle elec_twang elec_twip elec_wood""",
    "cymbal": """drum_cymbal_closed drum_cymbal_hard drum_cymbal_open drum_cymbal_pedal drum_cymbal_soft
        drum_splash_hard drum_splash_soft elec_cymbal""",
    "guitar": "guit_e_fifths guit_e_slide guit_em9 guit_harmonics",
    "kick": """bd_808 bd_ada bd_boom bd_fat bd_gas bd_haus bd_klub bd_pure bd_sone bd_tek bd_zome bd_zum drum_bass_hard
        drum_bass_soft drum_heavy_kick elec_hollow_kick elec_soft_kick""",
    "snare": """drum_snare_hard drum_snare_soft elec_filt_snare elec_hi_snare elec_lo_snare elec_mid_snare elec_snare
        sn_dolf sn_dub sn_zome""",
    "tabla": """tabla_dhec tabla_ghe1 tabla_ghe2 tabla_ghe3 tabla_ghe4 tabla_ghe5 tabla_ghe6 tabla_ghe7 tabla_ghe8
        tabla_ke1 tabla_ke2 tabla_ke3 tabla_na tabla_na_o tabla_na_s tabla_re tabla_tas1 tabla_tas2 tabla_tas3
        tabla_te1 tabla_te2 tabla_te_m tabla_te_ne tabla_tun1 tabla_tun2 tabla_tun3""",
    "tom": """drum_tom_hi_hard drum_tom_hi_soft drum_tom_lo_hard drum_tom_lo_soft drum_tom_mid_hard drum_tom_mid_soft
        elec_fuzz_tom""",
}
STRUMS = """Aminor, Asharp minro7b5, Bminor, Cmajor, Csharp minor, Dmajor, Dminor, Dsharp minor, Emajor, Eminor, Fmajor,
    Fsharp major, Fsharp minor, Gmajor, Gsharp minor"""
SYLLABLES = """ㄅㄚ ㄆㄛ2 ㄇㄞ3 ㄈㄟ4 ㄉㄠ ㄊㄡ2 ㄋㄢ3 ㄌㄧㄣ4 ㄍㄤ ㄎㄥ ㄏㄨ2 ㄐㄧ4 ㄑㄩ3 ㄒㄧㄝ2 ㄓㄨㄛ ㄔㄨㄟ2
    ㄕㄨㄢ4 ㄖㄨㄣ4 ㄗㄨㄥ3 ㄘㄞ2 ㄙㄠ4 ㄧㄚ ㄨㄤ2 ㄩㄢ4"""
HEADER = ["clip", "fold", "label", "author", "licence", "origin", "package", "file"]  # of sources.csv


class Recording(NamedTuple):
    """One file and whom it is owed to."""

    name: str
    path: Path
    package: str
    author: str
    licence: str
    origin: str


def sonic_pi(root: Path) -> dict[str, Recording]:
    """The recordings that debian/copyright states to be CC0, by name."""
    text = next(root.glob("usr/share/doc/*/copyright")).read_text()
    stanza = re.compile(
        r"^Files: etc/samples/(\w+)\.flac\nCopyright: [-, \d]*(.+)\n(?:Source: *)?(\S+)\nLicense: CC0$", re.MULTILINE
    )
    samples = root / "usr/share/sonic-pi/samples"
    return {
        name: Recording(name, samples / f"{name}.flac", root.name, author, "CC0 1.0", origin)
        for name, author, origin in stanza.findall(text)
    }


def groups(folder: Path) -> Iterator[tuple[str, list[Recording]]]:
    """(class, recordings that must share a fold)."""
    cc0 = sonic_pi(folder / "sonic-pi-samples")
    for label, names in SONIC_PI.items():
        for group in names.split():
            yield label, [cc0[name] for name in group.split("+")]
    root = folder / "hydrogen-drumkits-effects"
    for chord in re.split(r",\s+", STRUMS):
        path = root / "usr/share/hydrogen/data/drumkits/belofilms_GuitarStrums" / f"{chord}_00.flac"
        origin = "http://www.belofilms.com"
        name = "strum_" + chord.lower().replace(" ", "_")
        yield "guitar", [Recording(name, path, root.name, "Gabriel Verdugo Soto", "CC BY 3.0", origin)]
    root = folder / "gcin-voice"
    for number, syllable in enumerate(SYLLABLES.split()):
        path = root / "usr/share/gcin-voice/ogg" / syllable / "5.ogg"
        origin = "http://hyperrate.com/thread.php?tid=30325#30325"
        name = f"syllable_{number:02d}"
        yield "speech", [Recording(name, path, root.name, "ChionMeilin, Chu Lo", "CC BY 3.0", origin)]


def clips(path: Path) -> Iterator[np.ndarray]:
    """Whole seconds from the start of a recording, the first one padded if need be; silent ones are left."""
    audio = read_audio(path, RATE)
    audio = np.pad(audio, (0, max(0, RATE - len(audio)))).clip(-1, 1)
    for second in audio[: len(audio) // RATE * RATE].reshape(-1, RATE)[:CLIPS_OF_ONE]:
        if np.abs(second).max() > 0.01:
            yield second


def main(folder: Path) -> None:
    splits: dict[str, dict[str, list[str]]] = {fold: {} for fold in FOLDS}
    sources = []
    turn: dict[str, Iterator[str]] = defaultdict(lambda: itertools.cycle(FOLDS))
    for label, group in groups(folder):
        fold = next(turn[label])
        for recording in group:
            for number, audio in enumerate(clips(recording.path)):
                name = f"{recording.name}-{number}.ogg"
                target = TASK / str(RATE) / fold / name
                target.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(target, audio, RATE, format="OGG", subtype="OPUS", compression_level=0.85)
                if soundfile.info(target).frames != RATE:
                    sys.exit(f"{target}: the encoder did not keep the length")
                splits[fold][name] = [label]
                sources.append([name, fold, label, recording.author, recording.licence, recording.origin])
                sources[-1] += [recording.package, recording.path.relative_to(folder / recording.package)]

    for fold, labels in splits.items():
        (TASK / f"{fold}.json").write_text(json.dumps(dict(sorted(labels.items())), indent=1) + "\n")
    vocabulary = sorted({label for labels in splits.values() for (label,) in labels.values()})
    _table(TASK / "labelvocabulary.csv", [["idx", "label"], *enumerate(vocabulary)])
    _table(TASK / "sources.csv", [HEADER, *sources])
    metadata = {
        "task_name": "sound_kinds",
        "version": "v1.0",
        "mode": "full",
        "embedding_type": "scene",
        "prediction_type": "multiclass",
        "split_mode": "presplit_kfold",
        "nfolds": len(FOLDS),
        "splits": FOLDS,
        "sample_duration": 1.0,
        "evaluation": ["top1_acc", "mAP"],
        "download_urls": [],
    }
    (TASK / "task_metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")


def _table(path: Path, rows: list) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
