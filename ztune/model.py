"""A model: one bundle at work, on this machine or on a server that has its graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtimes import decoder
from runtimes.bundle import Bundle, load_bundle
from runtimes.extractor import OrtExtractor
from runtimes.in_memory import InMemoryImageEncoder, InMemoryImages
from runtimes.ort import OrtImageEncoder
from runtimes.preprocess import ImageLike, crop, read_image
from runtimes.prompts import embed_words, token_table, tokenize_words
from runtimes.providers import Execution, check_precision, resolve_execution
from runtimes.remote.endpoint import is_url, parse_named_server
from runtimes.remote.settings import parse_settings, settings_to_save
from runtimes.runtime import LocalRuntime, PromptGraph, Runtime
from runtimes.tokenizer import Tokenizer
from ztune.access import described
from ztune.artifact import Artifact, HeadArtifact, MixtureArtifact, classifier_of_texts
from ztune.data.cache import FeatureCache, FeatureStore
from ztune.data.features import Features, encode_files
from ztune.errors import ClosedError, ConfigError, DataError, ZtuneError
from ztune.logits import FeatureClassifier
from ztune.methods.base import ModelSpec, Patches
from ztune.mixing import mixed_texts
from ztune.progress import SILENCE, Progress, warn
from ztune.types import F32, ImageEncoder, Json

if TYPE_CHECKING:
    from runtimes.remote.connect import CheckedService
    from runtimes.remote.endpoint import Endpoint
    from runtimes.remote.served import ServerRuntime


_BATCH = 8


@dataclass
class Life:
    """Whether a model was closed: one for it and all copies that `replace` makes."""

    closed: bool = False


@dataclass(frozen=True)
class Model:
    """A bundle, what answers for it, and where progress goes: what `load` returns.

    >>> import ztune
    >>> with ztune.load("models/mini", provider="cpu") as model:
    ...     images = model.encode_images(["examples/digits/seven/0007.png"])
    ...     texts = model.encode_texts(["a photo of the digit seven."])
    >>> images.shape, (images @ texts.T).shape
    ((1, 128), (1, 1))
    """

    bundle: Bundle
    execution: Execution
    """How graphs run on this machine."""
    progress: Progress = SILENCE
    served: Runtime | None = None
    """The server that has the bundle's graphs; None: they run on this machine."""
    held: InMemoryImages = field(default_factory=dict)
    """Images that are in memory, by the paths that stand for them."""
    server: Mapping[str, Json] = field(default_factory=dict)
    """How a server was reached, as a run keeps it: without secrets."""
    life: Life = field(default_factory=Life, repr=False)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection to a server up, and whatever needs forward passes."""
        self.life.closed = True
        self.__dict__.pop("_prompt_graph", None)  # its session and memory
        if self.served is not None:
            self.served.close()

    def require_open(self) -> None:
        """See that the model was not closed.

        Raises: ClosedError.
        """
        if self.life.closed:
            raise ClosedError(f"{self.where} is closed: load it again with ztune.load")

    def __deepcopy__(self, _memo: object) -> Model:
        """Return the model itself: what copies a classifier's parameters shares it."""
        return self

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("a Model holds open sessions: load it in each process with ztune.load")

    @property
    def where(self) -> str:
        """What errors call it."""
        return self._runtime.where

    @property
    def runtime(self) -> Runtime:
        """What answers forward passes.

        Raises: ClosedError.
        """
        self.require_open()
        return self._runtime

    @cached_property
    def _runtime(self) -> Runtime:
        return self.served or LocalRuntime(self.bundle, self.execution)

    def images(self) -> ImageEncoder:
        """Return the image tower, which is opened when it is first used."""
        encoder = self.runtime.images()
        return InMemoryImageEncoder(encoder, self.bundle.image, self.held) if self.held else encoder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.bundle)

    @property
    def prompt_graph(self) -> PromptGraph:
        """The prompt graph, opened when first used: after the image tower is closed again.

        Raises: ClosedError.
        """
        self.require_open()
        return self._prompt_graph

    @cached_property
    def _prompt_graph(self) -> PromptGraph:
        return self.runtime.prompts(self.tokenizer)

    def features(
        self,
        items: Sequence[tuple[Path, str]],
        cache: Path | FeatureStore,
        *,
        what: str,
        n_views: int = 0,
        seed: int = 0,
        skip_broken: bool = False,
        extractor: Path | None = None,
    ) -> Features:
        """Encode images, those cached left out; the tower is closed again afterwards.

        `extractor` is another tower's ONNX file that takes the same pixels.
        """
        encoder = self.images()
        if extractor is not None:
            encoder = OrtExtractor(extractor, self.bundle, self.execution)
        with self.progress.activity(what, len(items) * max(1, n_views)) as ticker:
            result = encode_files(
                encoder,
                items,
                FeatureCache(cache) if isinstance(cache, Path) else cache,
                n_views=n_views,
                seed=seed,
                at_once=1 if extractor is not None else self.runtime.batches_at_once,
                progress=lambda done, _total: ticker.update(done),
                skip_broken=skip_broken,
            )
        if not result.kept.all():
            warn(f"{what}: {int((~result.kept).sum())} broken images left out")
        return result

    def encode_images(self, images: Sequence[ImageLike]) -> F32:
        """Return unit features f32[N, e] of paths, images of Pillow's or arrays u8[H, W, 3].

        The same bytes as a run's: batches always have the same size.

        Raises: DataError naming an image that cannot be read; ProviderError; ServerError;
            ClosedError.
        """
        if isinstance(images, str | Path):
            raise DataError("`images` are one path, expected a list of images")
        encoder, parts = self.images(), []
        for first in range(0, len(images), _BATCH):
            batch = images[first : first + _BATCH]
            decoded = [read_image(image, f"image {first + n}") for n, image in enumerate(batch)]
            pixels = [crop(image, self.bundle.image) for image in decoded]
            pixels += pixels[:1] * (_BATCH - len(pixels))
            parts.append(encoder.encode(np.stack(pixels))[: len(batch)])
        if not parts:
            raise DataError("`images` are empty, expected at least one")
        return np.concatenate(parts)

    def encode_texts(self, texts: Sequence[str]) -> F32:
        """Return unit features f32[N, e] of texts.

        Raises: DataError for a text that is too long for the tower; ServerError; ClosedError.
        """
        if isinstance(texts, str) or not len(texts):
            raise DataError("`texts` are one text or none, expected a list of texts")
        # One by one: two that are alike are no fault here, as two classes would be.
        return np.concatenate([self.prompt_graph.encode_template("{}", (text,)) for text in texts])

    def sentences(self, templates: Sequence[str], classes: tuple[str, ...]) -> F32:
        """Return unit features f32[C, e] of hand-written templates, the mean of several.

        A template has {} where the name of a class goes.

        Raises: DataError for a text that is too long for the tower; ServerError.
        """
        each = [self.prompt_graph.encode_template(template, classes) for template in templates]
        if len(each) == 1:
            return each[0]
        mean: F32 = np.mean(each, axis=0)
        return np.asarray(mean / np.linalg.norm(mean, axis=-1, keepdims=True), dtype=np.float32)

    def zero_shot(self, templates: Sequence[str], classes: tuple[str, ...]) -> FeatureClassifier:
        """Return the classifier of hand-written templates: features f32[N, e] to f32[N, C].

        Raises: DataError for a text that is too long for the tower; ServerError.
        """
        texts = self.sentences(templates, classes)
        return classifier_of_texts(texts, self.bundle.logit_scale, self.bundle.logit_bias)

    def spec(self, n_extracted: int) -> ModelSpec:
        """Return what a method may know of the bundle before it asks anything.

        `n_extracted` is how many values of an image a decoder sees.
        """
        bundle, visual = self.bundle, self.bundle.visual
        patches = None
        if visual is not None:
            patches = Patches(
                visual.width, visual.patch_values, visual.patch_mean, visual.patch_std
            )
        return ModelSpec(
            text_width=bundle.text.width,
            token_table=token_table(bundle),
            context_of_words=lambda words: embed_words(bundle, self.tokenizer, words),
            ids_of_words=lambda words: tokenize_words(self.tokenizer, words),
            words=self.tokenizer.text_ids,
            image_size=bundle.image.size,
            decoder_start=lambda rng: decoder.initial_values(n_extracted, bundle.image.size, rng),
            patches=patches,
        )

    def refreshed(self, artifact: Artifact, classes: tuple[str, ...] | None = None) -> Artifact:
        """Return the artifact with text features from this bundle, for other classes if named.

        Raises: DataError when a head is asked for classes that it was not fitted on, or the bundle
            is not of its width.
        """
        if isinstance(artifact, HeadArtifact):
            if artifact.weight.shape[1] != self.bundle.embed_dim:
                raise DataError(
                    f"the artifact is for features of {artifact.weight.shape[1]} values, the "
                    f"bundle's image tower gives {self.bundle.embed_dim} (use the bundle it was "
                    "tuned on)"
                )
            if classes is not None and set(classes) != set(artifact.classes):
                raise DataError(
                    "a head serves only the classes it was fitted on: "
                    f"{', '.join(artifact.classes)} (a tuned context serves any)"
                )
            return artifact
        wanted = classes or artifact.classes
        if isinstance(artifact, MixtureArtifact):
            if (
                artifact.provenance.bundle_digest == self.bundle.digest
                and wanted == artifact.classes
            ):
                return artifact  # encoding all prompts again would give the same
            if set(wanted) - set(artifact.classes):
                warn(
                    "a mixture's weights were found for the classes it was tuned on; for other "
                    "class names one context does better (`method=ogn-context`)"
                )
            texts = self.mixed(artifact, wanted)
        elif artifact.context is None:
            texts = self.sentences(artifact.templates, wanted)
        else:
            if artifact.context.shape[1] != self.bundle.text.width:
                raise DataError(
                    f"the context has {artifact.context.shape[1]} values a token, the bundle's "
                    f"text tower takes {self.bundle.text.width}"
                )
            encoder = self.prompt_graph.encoder(wanted, len(artifact.context), 1)
            texts = encoder.encode(artifact.context[None])[0]
        bundle = self.bundle
        return replace(
            artifact,
            classes=wanted,
            text_features=texts,
            logit_scale=bundle.logit_scale,
            logit_bias=bundle.logit_bias,
        )

    def mixed(self, artifact: MixtureArtifact, classes: tuple[str, ...]) -> F32:
        """Return a mixture's text features f32[C, e], all its prompts encoded anew.

        Raises: DataError when a token is not in this bundle's table.
        """
        tokens, at_once, table = artifact.tokens, artifact.at_once, token_table(self.bundle)
        if tokens.max() >= len(table):
            raise DataError(
                f"the mixture has token {tokens.max()}, the bundle's table ends at "
                f"{len(table) - 1} (use the bundle it was tuned on)"
            )
        encoder = self.prompt_graph.encoder(classes, tokens.shape[1], at_once)
        self.progress.remark(f"encoding {len(tokens)} prompts for {len(classes)} classes")
        return mixed_texts(encoder, table[tokens], artifact.weights, at_once)


def load(
    place: Path | str,
    *,
    provider: str = "auto",
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress = SILENCE,
    **server: Json,
) -> Model:
    """Return a model at work: the bundle in a folder, or the one that a server's URL names.

    `provider` is auto, cpu, cuda or tensorrt; `threads` is a number of threads, without
    spin-waiting (None: all cores); `memory_limit` is MB of the tuning's forward passes above the
    weights. `progress` is told what is under way (ztune.progress.Progress). With a URL
    (`triton://host:8001/NAME`, `http://…`) further arguments are settings of the server: client,
    images, losses, deadline (s), give_up (s), tls_ca, token_file and so on (docs/remote.md). A
    Model is a context manager; its graphs are opened when they are used.

    Raises: FormatError for a folder that is no bundle; ProviderError for a provider that does not
        run; ServerError; ConfigError.

    >>> import ztune
    >>> with ztune.load("models/mini", provider="cpu") as model:
    ...     model.encode_texts(["a photo of the digit seven."]).shape
    (1, 128)
    """
    if not is_url(place):
        if server:
            raise ConfigError(f"`{next(iter(server))}` goes with a server's URL; leave it out")
        execution = resolve_execution(provider, threads, progress, memory_limit)
        return open_model(Path(place), execution, progress)
    own = ("client", "images", "losses")
    values: dict[str, Json] = {name: server.pop(name) for name in own if name in server}
    values["connection"] = dict(server)
    here = (provider, threads, memory_limit)
    if here[2] is not None or (values.get("images") != "local" and here != ("auto", None, None)):
        raise ConfigError(
            "how graphs run is the server's affair: leave out `provider`, `threads` and "
            "`memory_limit`"
        )
    return open_served_model(
        str(place),
        values,
        parse_named_server(place),
        progress,
        provider=provider,
        threads=threads,
    )


def open_model(path: Path, execution: Execution, progress: Progress = SILENCE) -> Model:
    """Load a bundle; its graphs are opened when they are used.

    Raises: FormatError, ProviderError when the provider cannot run the bundle's precision.
    """
    bundle = load_bundle(path)
    check_precision(bundle.precision, execution.provider)
    return Model(bundle, execution, progress)


def connect_server(
    url: str,
    values: Mapping[str, Json],
    named: Endpoint | None,
    progress: Progress = SILENCE,
) -> CheckedService:
    """Reach a server, fetch the client half where it is not named, and check both.

    `values` are server settings, `named` is the server that may be told secrets.

    Raises: ServerError, ConfigError.
    """
    from runtimes.remote.connect import connect

    settings = parse_settings(values)
    client = None if settings.client is None else Path(settings.client)
    with progress.activity("fetching the client half", 100) as ticker:
        return connect(
            url,
            replace(settings.to_connection(), named=named),
            client,
            progress.remark,
            lambda done, total: ticker.update(done * 100 // max(1, total), unit=" %"),
        )


def open_served_model(
    url: str,
    values: Mapping[str, Json],
    named: Endpoint | None,
    progress: Progress = SILENCE,
    *,
    provider: str = "auto",
    threads: int | None = None,
) -> Model:
    """Return a bundle at work on a server; `provider` and `threads` are of a local image tower.

    Raises: ServerError, ConfigError; ProviderError where images are encoded here and cannot be.
    """
    from runtimes.remote.served import ServerRuntime

    settings, images = parse_settings(values), None
    execution = Execution("cpu", threads)
    if settings.images == "local":
        execution = resolve_execution(provider, threads, progress)
    connected = connect_server(url, values, named, progress)
    bundle = connected.bundle
    try:
        if settings.images == "local":
            check_precision(bundle.precision, execution.provider)
            bundle.file("image.onnx")
            images = OrtImageEncoder(bundle, execution)
        served = ServerRuntime(connected.service, bundle, images, settings.losses)
    except ZtuneError:
        connected.service.close()
        raise
    progress.remark(_described(served))
    return Model(bundle, execution, progress, served, server=settings_to_save(values))


def _described(served: ServerRuntime) -> str:
    """Return the line that says what a server is and gives."""
    service = served.service
    return (
        f"server {service.location}: bundle {served.bundle.digest[:12]}…, "
        f"{served.bundle.precision}; gives {described(served.access)}"
    )
