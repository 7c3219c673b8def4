"""Compare BlackVIP's decoder with a transcription of the paper's network in torch."""

from typing import Any

import numpy as np
import onnx
import pytest

from runtimes import decoder
from runtimes.decoder import (
    N_STATISTICS,
    Decoder,
    decoder_graph,
    initial_values,
    layout,
    n_values,
    output_side,
    weight_shapes,
)
from runtimes.providers import Execution
from ztune.errors import ConfigError
from ztune.types import F32

torch = pytest.importorskip("torch")
nn = torch.nn
CPU = Execution()
# extractor values and image side: the published ones, a grid that the image sets and is cut,
# one that the feature sets, with 3, 4, 1 and no doublings
SIZES = [(768, 224), (8, 70), (128, 24), (33, 32), (32, 3), (32, 2)]


def network(k: int, size: int, values: F32) -> Any:
    """Return the paper's layers with these values, in torch's order."""
    channels = [(32, 64, 64), (64, 64, 32), (32, 32, 32), (32, 32, 16)]
    layers: list[Any] = []
    n_doublings = {(768, 224): 5, (8, 70): 5, (8, 32): 5, (128, 24): 3, (33, 32): 4}.get((k, size))
    if n_doublings is None:
        n_doublings = {3: 1, 2: 0}[size]
    kernels = [1] * (5 - n_doublings) + [2] * n_doublings
    for (n_in, n_between, n_out), kernel in zip(channels, kernels, strict=False):
        layers += [
            nn.ConvTranspose2d(n_in, n_between, kernel, kernel, groups=n_in),
            nn.Conv2d(n_between, n_out, 1, bias=False),
            nn.BatchNorm2d(n_out, momentum=1.0),  # keeps the last batch's statistics
            nn.GELU(),
        ]
    last = nn.ConvTranspose2d(16, 3, kernels[-1], kernels[-1], bias=False)
    net = nn.Sequential(*layers, last)
    sizes = [parameter.numel() for parameter in net.parameters()]
    n_trigger = len(values) - sum(sizes)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(values[n_trigger:]), net.parameters())
    return net, torch.from_numpy(values[:n_trigger]), round(((k + n_trigger) / 32) ** 0.5)


def by_torch(k: int, size: int, values: F32, features: F32, statistics: F32 | None) -> Any:
    """Return perturbation f32[N, 3, S, S] and the biased statistics f32[2, 144] of the batch."""
    net, trigger, g = network(k, size, values)
    norms = [layer for layer in net if isinstance(layer, nn.BatchNorm2d)]
    seen: list[Any] = []
    for norm in norms:
        norm.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    if statistics is not None:
        splits = np.cumsum([64, 32, 32])
        pairs = zip(*(np.split(row, splits) for row in statistics), strict=True)
        for norm, (mean, variance) in zip(norms, pairs, strict=True):
            norm.running_mean, norm.running_var = torch.tensor(mean), torch.tensor(variance)
    net.train(statistics is None)
    with torch.no_grad():
        given = torch.from_numpy(features)
        latent = torch.cat([given, trigger.expand(len(given), -1)], 1).reshape(-1, 32, g, g)
        image = net(latent).numpy()
    own = [
        torch.cat([x.mean((0, 2, 3)) for x in seen]),
        torch.cat([x.var((0, 2, 3), correction=0) for x in seen]),
    ]
    first = (image.shape[-1] - size) // 2
    cut = image[:, :, first : first + size, first : first + size]
    return cut, torch.stack(own).numpy()


def drawn(k: int, size: int, n_images: int) -> tuple[F32, F32]:
    """Return values that differ from every default, and features."""
    rng = np.random.default_rng(0)
    values = initial_values(k, size, rng) + 0.05 * rng.standard_normal(n_values(k, size))
    features = rng.standard_normal((n_images, k))
    return values.astype(np.float32), features.astype(np.float32)


def test_the_published_size() -> None:
    assert n_values(768, 224) == 9920
    assert dict(weight_shapes(768, 224))["trigger"] == (800,)
    assert layout(768, 224) == (7, (2, 2, 2, 2, 2))
    assert N_STATISTICS == 64 + 32 + 32 + 16


@pytest.mark.parametrize(("k", "size"), SIZES)
def test_the_latent_is_the_smallest_that_holds_feature_and_trigger(k: int, size: int) -> None:
    fitting = [g for g in range(1, 99) if 32 * g >= size and 32 * g * g > k]
    g, kernels = layout(k, size)
    assert g == fitting[0]
    # No smaller number of doublings covers the image, which only the published five may overshoot.
    assert output_side(k, size) >= size > (output_side(k, size) // 2 if 2 in kernels else 0)
    net, trigger, g = network(k, size, np.zeros(n_values(k, size), np.float32))
    assert g == layout(k, size)[0]
    n_weights = sum(parameter.numel() for parameter in net.parameters())
    assert len(trigger) == 32 * g * g - k
    assert n_weights == 9120 if all(kernel == 2 for kernel in kernels) else n_weights < 9120
    shapes = [tuple(parameter.shape) for parameter in net.parameters()]
    assert [shape for _, shape in weight_shapes(k, size)] == [(len(trigger),), *shapes]


@pytest.mark.parametrize(("k", "size"), SIZES)
def test_it_equals_the_network_in_torch(k: int, size: int) -> None:
    values, features = drawn(k, size, 5)
    network_in_ort = Decoder(k, size, CPU)
    expected, own = by_torch(k, size, values, features, None)
    statistics = network_in_ort.statistics(values, features)
    np.testing.assert_allclose(statistics, own, rtol=1e-4, atol=1e-5)
    image = network_in_ort(values, features, statistics)
    assert image.shape == (5, 3, size, size)
    np.testing.assert_allclose(image, expected, atol=5e-5)
    np.testing.assert_allclose(network_in_ort.decode_batch(values, features), expected, atol=5e-5)
    # With fixed statistics an image does not depend on the batch.
    other = network_in_ort.statistics(values, features[:2] * 0.5)
    expected, _ = by_torch(k, size, values, features, other)
    image = network_in_ort(values, features, other)
    np.testing.assert_allclose(image, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(image[0] - image[1]).max() > 1e-2


def test_statistics_of_several_calls_equal_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    k, size = 8, 32
    values, features = drawn(k, size, 11)
    whole = Decoder(k, size, CPU)
    monkeypatch.setattr(decoder, "_PIXELS", 4 * 32 * 32)
    cut = Decoder(k, size, CPU)
    assert [len(part) for part in cut._calls(features)] == [4, 4, 3]
    expected = whole.statistics(values, features)
    np.testing.assert_allclose(cut.statistics(values, features), expected, rtol=1e-5, atol=1e-6)
    given = values, features, expected
    np.testing.assert_allclose(cut(*given), whole(*given), atol=1e-5)
    assert np.abs(expected - whole.statistics(values, features[:4])).max() > 1e-3


def published_layers() -> Any:
    """Return the published decoder of 224 px, whose 1x1 layers are transposed and have no bias."""
    layers: list[Any] = []
    for n_in, n_between, n_out in ((32, 64, 64), (64, 64, 32), (32, 32, 32), (32, 32, 16)):
        layers += [
            nn.ConvTranspose2d(n_in, n_between, 2, 2, groups=n_in),
            nn.ConvTranspose2d(n_between, n_out, 1, bias=False),
            nn.BatchNorm2d(n_out),
        ]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 2, 2, bias=False))


def test_the_initial_values_follow_the_published_layers_in_torch() -> None:
    rng, shapes = np.random.default_rng(3), weight_shapes(768, 224)
    ends = np.cumsum([int(np.prod(shape)) for _, shape in shapes])[:-1]
    starts = np.stack([initial_values(768, 224, rng) for _ in range(40)])
    assert starts.dtype == np.float64
    assert starts[0].tobytes() == initial_values(768, 224, np.random.default_rng(3)).tobytes()
    ours = {n: part for (n, _), part in zip(shapes, np.split(starts, ends, axis=1), strict=True)}
    trigger = ours.pop("trigger")
    assert trigger.min() >= 0
    assert 0.0999 < trigger.max() < 0.1
    torch.manual_seed(0)
    nets = [list(published_layers().parameters()) for _ in range(40)]
    assert sum(parameter.numel() for parameter in nets[0]) + trigger.shape[1] == 9920
    for place, (name, part) in enumerate(ours.items()):
        theirs = np.stack([net[place].detach().numpy().ravel() for net in nets])
        assert part.shape == theirs.shape, name
        if name.startswith(("gain", "shift")):
            assert (part == theirs).all(), name
        else:
            # Of 1,280 uniform values or more, the largest are at the bound, and so is the spread.
            bound = {"spread_0": 8, "spread_bias_0": 8, "mix_0": 64, "mix_1": 32, "mix_2": 32,
                     "mix_3": 16, "image": 12}.get(name, 4) ** -0.5  # fmt: skip
            for values in (part, theirs):
                assert np.abs(values).max() == pytest.approx(bound, rel=0.01), name
                assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05), name
                assert abs(values.mean()) < 4 * bound / np.sqrt(3 * values.size), name


def test_graphs_are_valid_and_run_on_the_oldest_onnxruntime() -> None:
    for measured in (None, 0, 3):
        model = onnx.load_from_string(decoder_graph(24, 20, measured))
        onnx.checker.check_model(model, full_check=True)
        assert (model.ir_version, model.opset_import[0].version) == (10, 20)
        names = [value.name for value in model.graph.input]
        assert names == ["features", "values", "statistics"][: 2 if measured == 0 else 3]


def test_mismatches_are_refused() -> None:
    values, features = drawn(8, 32, 2)
    open_decoder = Decoder(8, 32, CPU)
    with pytest.raises(ConfigError, match=r"`values` is f32\[9143\], expected f32\[9144\]"):
        open_decoder.statistics(values[1:], features)
    with pytest.raises(ConfigError, match=r"`features` is f32\[2, 7\], expected f32\[2, 8\]"):
        open_decoder.statistics(values, features[:, 1:])
    with pytest.raises(ConfigError, match=r"`statistics` is f32\[2, 3\], expected f32\[2, 144\]"):
        open_decoder(values, features, np.zeros((2, 3), np.float32))
