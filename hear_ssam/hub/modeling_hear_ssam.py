"""transformers' door to hear_ssam: AutoModel and AutoFeatureExtractor with trust_remote_code=True.

    extractor = AutoFeatureExtractor.from_pretrained(FOLDER, trust_remote_code=True)
    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    output = model(**extractor(list_of_arrays, sampling_rate=16000, return_tensors="pt"))
    output.pooler_output, output.last_hidden_state     # scenes (clips, E'), rows over time (clips, T, E)

Needs the package: pip install hear-ssam.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchFeature, PretrainedConfig, PreTrainedModel, SequenceFeatureExtractor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hear_ssam.hear import untrained


class HearSsamConfig(PretrainedConfig):
    model_type = "hear_ssam"


class HearSsamFeatureExtractor(SequenceFeatureExtractor):
    """Mono clips at 16 kHz, float in [-1, 1] → float32 `input_values` (clips, samples), padded, with their mask."""

    model_input_names = ("input_values", "attention_mask")

    def __call__(
        self, audio: Any, sampling_rate: int | None = None, return_tensors: str | None = None, **options: Any
    ) -> BatchFeature:
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(f"sampling_rate must be {self.sampling_rate}, not {sampling_rate}: resample the audio.")
        several = isinstance(audio, list | tuple) and len(audio) > 0 and np.ndim(audio[0]) > 0
        clips = audio if several or np.ndim(audio) == 2 else [audio]
        values = {"input_values": [np.asarray(clip, np.float32) for clip in clips]}
        return self.pad(BatchFeature(values), return_tensors=return_tensors, **{"padding": True, **options})


class HearSsamModel(PreTrainedModel):
    """The encoder of hear_ssam. Each clip gives what it gives alone, whatever pads it."""

    config_class = HearSsamConfig
    base_model_prefix = "encoder"
    main_input_name = "input_values"
    hear: Any

    def __init__(self, config: HearSsamConfig) -> None:
        super().__init__(config)
        hear = untrained(config.name, config.encoder)
        self.encoder = hear.encoder
        self.__dict__["hear"] = hear  # no child: its encoder is ours already, and its front end has no weights
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """All of them are in the file."""

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> BaseModelOutputWithPooling:
        mask = torch.ones_like(input_values, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        lengths = mask.sum(1).tolist()
        self.hear.frontend.to(input_values.device)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for length in set(lengths):
            mine = [i for i, own in enumerate(lengths) if own == length]
            scenes, rows = self.hear.scene_and_rows(torch.stack([input_values[i][mask[i]] for i in mine]))
            found |= {i: (scene, row) for i, scene, row in zip(mine, scenes, rows, strict=True)}
        return BaseModelOutputWithPooling(
            last_hidden_state=nn.utils.rnn.pad_sequence([found[i][1] for i in range(len(lengths))], batch_first=True),
            pooler_output=torch.stack([found[i][0] for i in range(len(lengths))]),
        )
