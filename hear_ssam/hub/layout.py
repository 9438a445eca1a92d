"""A model as a folder in Hugging Face's layout, beside its weights: config, feature extractor, remote code, card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import HearSsamError
from ..frontend import SAMPLE_RATE
from ..paths import atomic_write

CODE = "modeling_hear_ssam"  # the module beside this one that goes into the folder
LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0")  # in the hub's spelling


def describe(
    folder: Path, name: str, encoder: Mapping[str, Any], sizes: tuple[int, int], info: Mapping[str, Any], text: str
) -> None:
    """Write everything but the weights. `encoder`: its config; `sizes`: widths of scenes and of timestamps; `info`:
    what the file of weights tells about itself; `text`: the card that it came with."""
    config = {
        "architectures": ["HearSsamModel"],
        "auto_map": {"AutoConfig": f"{CODE}.HearSsamConfig", "AutoModel": f"{CODE}.HearSsamModel"},
        "encoder": dict(encoder),
        "hidden_size": sizes[1],
        "model_type": "hear_ssam",
        "name": name,
        "scene_embedding_size": sizes[0],
    }
    extractor = {
        "auto_map": {"AutoFeatureExtractor": f"{CODE}.HearSsamFeatureExtractor"},
        "feature_extractor_type": "HearSsamFeatureExtractor",
        "feature_size": 1,
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": SAMPLE_RATE,
    }
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "preprocessor_config.json": json.dumps(extractor, indent=2) + "\n",
        f"{CODE}.py": Path(__file__).with_name(f"{CODE}.py").read_text("utf-8"),
        "README.md": card(name, encoder, sizes, info, text),
    }
    for file, text in texts.items():
        with atomic_write(folder / file) as temporary:
            temporary.write_text(text, "utf-8")


def card(name: str, encoder: Mapping[str, Any], sizes: tuple[int, int], info: Mapping[str, Any], text: str) -> str:
    """The model card: a YAML header, how to use the model, then `text` or what its file tells about itself."""
    licence = str(info.get("licence", ""))
    header: dict[str, Any] = {"library_name": "hear-ssam", "pipeline_tag": "feature-extraction"}
    header["license"] = licence.partition(",")[0].lower()
    if header["license"] not in LICENCES:
        header |= {"license": "other", "license_name": licence or "unknown"}
    header["tags"] = ["audio", "audio-embeddings", "self-supervised", encoder["system"]]
    facts = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in info.items() if key != "sha256")
    return f"""---
{"".join(f"{key}: {json.dumps(value)}" + chr(10) for key, value in header.items())}---

# {name}

Audio embeddings: {sizes[0]} numbers per clip, {sizes[1]} per moment. 16 kHz mono, float32 in [-1, 1].

```python
import hear_ssam

model = hear_ssam.load_model("OWNER/NAME")                       # or this folder
scenes = hear_ssam.get_scene_embeddings(audio, model)            # (clips, samples) → (clips, {sizes[0]})
rows, ms = hear_ssam.get_timestamp_embeddings(audio, model)
```

With transformers: `AutoFeatureExtractor` and `AutoModel.from_pretrained("OWNER/NAME", trust_remote_code=True)`, whose
`pooler_output` are the scenes and whose `last_hidden_state` are the rows.

{text.replace(f"# {name}", "## About these weights", 1) if text else facts}
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
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Weights of {folder.name}")
    except Exception as error:  # of many classes: rights, names, network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HearSsamError(f"{repo}: cannot be pushed: {reason}; check the name and `hf auth login`.") from error
    return str(url)
