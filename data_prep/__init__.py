"""Raw files -> prepared TFDS data, texts and embeddings; never imports the training loop."""
