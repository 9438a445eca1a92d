"""Pre-training: the store of audio, and what is made of it."""
