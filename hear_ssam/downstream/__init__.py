"""What embeddings are used for: classifiers, search, a map, a step of a scikit-learn pipeline."""
