"""hear_ssam as an audio model of mteb, for `mteb/models/model_implementations/` there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.modality_collators import AudioCollator
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from mteb import TaskMetadata
    from mteb.types import Array, BatchedInput, PromptType
    from torch.utils.data import DataLoader


class HearSsamWrapper(AbsEncoder):
    """Scene embeddings: windows of 2 s over the whole clip, mean and standard deviation over time."""

    def __init__(self, model_name: str, revision: str | None, device: str | None = None, **kwargs: Any) -> None:
        import torch

        import hear_ssam

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = hear_ssam.load_model(model_name.rpartition("/")[2]).to(self.device)

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        show_progress_bar: bool = True,
        **kwargs: Any,
    ) -> Array:
        import numpy as np
        import torch

        import hear_ssam

        inputs.collate_fn = AudioCollator(target_sampling_rate=self.model.sample_rate)
        embeddings = []
        for batch in tqdm(inputs, disable=not show_progress_bar):
            for item in batch["audio"]:
                audio = np.asarray(item["array"], dtype=np.float32)
                audio = audio.mean(axis=0) if audio.ndim > 1 else audio
                clip = torch.from_numpy(audio)[None].to(self.device)
                with torch.inference_mode():
                    embeddings.append(hear_ssam.get_scene_embeddings(clip, self.model).cpu().numpy())
        return np.concatenate(embeddings)


ssam_tiny = ModelMeta(
    loader=HearSsamWrapper,
    name="hear_ssam/ssam_tiny",
    languages=None,
    open_weights=True,
    revision="0.2.0",
    release_date="2026-11-26",
    max_tokens=None,
    n_parameters=4_800_000,
    n_embedding_parameters=None,
    memory_usage_mb=19,
    embed_dim=1920,
    license="apache-2.0",
    reference=None,
    similarity_fn_name="cosine",
    framework=["PyTorch"],
    use_instructions=False,
    public_training_code=None,
    public_training_data=None,
    training_datasets=None,
    modalities=["audio"],
    model_type=["dense"],
)
