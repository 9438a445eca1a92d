"""A model as a folder in Hugging Face's layout, beside its weights: config, feature extractor, remote code, card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import HearSsamError
from ..frontend import SAMPLE_RATE
from ..paths import write_whole

CODE = "modeling_hear_ssam"  # the module beside this one that goes into the folder
ABOUT = "## About these weights"  # in a folder's card, above the one that the weights came with
LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0")  # in the hub's spelling


def describe(
    folder: Path, name: str, encoder: Mapping[str, Any], sizes: tuple[int, int], info: Mapping[str, Any], text: str
) -> None:
    """Write everything but the weights. `encoder`: its config; `sizes`: widths of scenes and of timestamps; `info`:
    what the file of weights tells about itself; `text`: the card that it came with."""
    config = {
        "architectures": ["HearSsamModel"], "model_type": "hear_ssam", "name": name, "encoder": dict(encoder),
        "auto_map": {"AutoConfig": f"{CODE}.HearSsamConfig", "AutoModel": f"{CODE}.HearSsamModel"},
        "scene_embedding_size": sizes[0], "hidden_size": sizes[1],
    }  # fmt: skip
    extractor = {
        "auto_map": {"AutoFeatureExtractor": f"{CODE}.HearSsamFeatureExtractor"}, "feature_size": 1,
        "feature_extractor_type": "HearSsamFeatureExtractor", "padding_value": 0.0, "return_attention_mask": True,
        "sampling_rate": SAMPLE_RATE,
    }  # fmt: skip
    licence = str(info.get("licence", ""))
    known = licence.partition(",")[0].lower()
    header = {
        "library_name": "hear-ssam", "pipeline_tag": "feature-extraction",
        **({"license": known} if known in LICENCES else {"license": "other", "license_name": licence or "unknown"}),
        "tags": ["audio", "audio-embeddings", "self-supervised", encoder["system"]],
    }  # fmt: skip
    facts = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in info.items() if key != "sha256")
    values = {
        "header": "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items()), "name": name,
        "scene": sizes[0], "rows": sizes[1], "text": re.sub(r"\A(# .*)?\s*", f"{ABOUT}\n\n", text) if text else facts,
    }  # fmt: skip
    for file, content in {
        "config.json": json.dumps(config, indent=2) + "\n",
        "preprocessor_config.json": json.dumps(extractor, indent=2) + "\n",
        f"{CODE}.py": Path(__file__).with_name(f"{CODE}.py").read_text("utf-8"),
        "README.md": CARD.format(**values),
    }.items():
        write_whole(folder / file, content)


def card_beside(weights: Path, name: str) -> str:
    """The card of a file of weights: the text of its name beside it, or what `describe` made of one; empty without."""
    own, folders = weights.with_suffix(".md"), weights.with_name("README.md")
    if own.is_file():
        return own.read_text("utf-8", "replace")
    page = folders.read_text("utf-8", "replace") if folders.is_file() else ""
    _, mark, about = page.partition(ABOUT)
    return f"# {name}\n\n{about.strip()}\n" if mark else ""


CARD = """---
{header}
---

# {name}

Audio embeddings: {scene} numbers per clip, {rows} per moment. 16 kHz mono, float32 in [-1, 1].

```python
import hear_ssam

model = hear_ssam.load_model("OWNER/NAME")                       # or this folder
scenes = hear_ssam.get_scene_embeddings(audio, model)            # (clips, samples) → (clips, {scene})
rows, ms = hear_ssam.get_timestamp_embeddings(audio, model)
```

With transformers: `AutoFeatureExtractor` and `AutoModel.from_pretrained("OWNER/NAME", trust_remote_code=True)`, whose
`pooler_output` are the scenes and whose `last_hidden_state` are the rows.

{text}
"""


def upload(folder: Path, repo: str, private: bool, token: str | None) -> str:
    """The folder as a commit to OWNER/NAME on the hub; the address of the repository."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise HearSsamError(f"{repo}: pushing needs huggingface_hub; pip install 'hear-ssam[hub]'.") from error
    api = HfApi(token=token, library_name="hear-ssam")
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Weights of hear_ssam")
    except Exception as error:  # of many classes: rights, names, network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HearSsamError(f"{repo}: cannot be pushed: {reason}; check the name and `hf auth login`.") from error
    return str(url)
