"""The embedded default model: a small CLIP trained on images this package draws and captions."""
