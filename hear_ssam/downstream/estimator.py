"""Embeddings as a step of a scikit-learn pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin

from ..embedding.clips import embed
from ..hear import HearModel, load_model


class HearEmbedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Paths or arrays of audio → scene embeddings (clips, E): `hear_ssam.embed` with the methods of a transformer.

    model, rate, pooling, layers as of `embed`; `model` is what `load_model` takes or gives. There is nothing to fit.

        make_pipeline(HearEmbedder(), StandardScaler(), LogisticRegression()).fit(paths, labels)
    """

    def __init__(
        self, model: HearModel | str = "", *, rate: int = 16_000, pooling: Any = None,
        layers: Sequence[int] | None = None, device: str = "auto",
    ) -> None:  # fmt: skip
        self.model = model
        self.rate = rate
        self.pooling = pooling
        self.layers = layers
        self.device = device

    def fit(self, X: Any, y: Any = None) -> HearEmbedder:
        """Load the model."""
        self.model_ = self.model if isinstance(self.model, HearModel) else load_model(self.model, device=self.device)
        self._fitted = self.model, self.device
        return self

    def transform(self, X: Any) -> np.ndarray:
        """What `embed` gives for X, a list of paths or clips, or an array (clips, samples)."""
        if getattr(self, "_fitted", None) != (self.model, self.device):  # never, or before `set_params`
            self.fit(X)
        found = embed(X, self.model_, rate=self.rate, pooling=self.pooling, layers=self.layers)
        self._n_features_out = found.shape[1]
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True
        tags.input_tags.two_d_array = False  # features are samples of audio, at least 201 of them, or there are paths
        tags.input_tags.string = True
        return tags
