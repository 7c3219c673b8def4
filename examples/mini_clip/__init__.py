"""Train the embedded default model: a small CLIP on images that this package draws and captions."""
