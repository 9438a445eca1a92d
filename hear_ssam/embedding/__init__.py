"""Audio as people have it → embeddings: clips of any length and number, files, collections."""
