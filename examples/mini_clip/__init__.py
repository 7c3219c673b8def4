"""The embedded default model: a small CLIP trained on pictures this package draws and captions."""
