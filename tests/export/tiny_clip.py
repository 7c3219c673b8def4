"""A small CLIP in open_clip's registry, and its features in open_clip."""

import warnings
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from tests.export.small_models import small_config
from ztune.types import F32

CONFIG: dict[str, Any] = small_config("ViT-B-32")
CONFIG["embed_dim"] = 24
CONFIG["vision_cfg"] |= {"width": 32, "layers": 2, "head_width": 16, "image_size": 32}
CONFIG["vision_cfg"] |= {"patch_size": 8}
CONFIG["text_cfg"] |= {"width": 32, "heads": 2, "layers": 2, "context_length": 20}
KNOWN = '{"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "quick_gelu": false}'


def build(name: str = "Tiny-C", seed: int = 0, **options: Any) -> Any:
    """Build a registered model with random weights, biases and gains included."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = open_clip.create_model(name, load_weights=False, **options)
        for parameter in model.parameters():
            parameter.data = parameter.data.nan_to_num(0, 0, 0).clamp(-2, 2)
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.contiguous().clone() for key, value in model.state_dict().items()}


def features(model: Any) -> tuple[F32, F32]:
    """Return features of three random images and texts."""
    random = torch.Generator().manual_seed(5)
    side = model.visual.image_size
    side = side[0] if isinstance(side, tuple) else side
    length = getattr(model, "context_length", 20)
    tokens = torch.randint(1, 49406, (3, length), generator=random)
    tokens[:, 5] = 49407
    with torch.no_grad():
        images = model.encode_image(torch.randn(3, 3, side, side, generator=random))
        texts = model.encode_text(tokens)
    return images.numpy(), texts.numpy()


def assert_same(model: Any, source: Any, atol: float = 1e-5) -> None:
    for got, expected in zip(features(model), features(source), strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(got, expected, atol=atol)
