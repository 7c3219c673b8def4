"""A model: a loaded bundle, run on this machine or on a server."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtimes import decoder
from runtimes.bundle import Bundle, load_bundle
from runtimes.conversions import count_conversions, report_conversions
from runtimes.extractor import OrtExtractor
from runtimes.in_memory import InMemoryImageEncoder, InMemoryImages
from runtimes.ort import OrtImageEncoder, OrtPromptGraph
from runtimes.preprocess import ImageLike, crop, with_image
from runtimes.prompts import embed, embed_words, token_table, tokenize_words
from runtimes.providers import Execution, check_precision, onnxruntime, resolve_execution
from runtimes.remote.endpoint import is_url, parse_named_server
from runtimes.remote.settings import parse_settings, settings_to_save
from runtimes.runtime import LocalRuntime, PromptGraph, Runtime
from runtimes.tokenizer import Tokenizer
from ztune.artifact import (
    Artifact,
    EnsembleArtifact,
    HeadArtifact,
    MixtureArtifact,
    VisualArtifact,
    classifier_of_texts,
    inliers_of,
)
from ztune.capabilities import EVERYTHING, IMAGE_TOKENS, describe
from ztune.data.cache import FeatureCache, FeatureStore
from ztune.data.features import CENTRE, Features, Views, encode_files
from ztune.errors import ClosedError, ConfigError, DataError, ZtuneError
from ztune.logits import FeatureClassifier
from ztune.methods.base import ModelSpec, Patches
from ztune.mixing import blend_for_other_classes, mix_text_features
from ztune.printing import first_few
from ztune.progress import SILENCE, Progress, warn
from ztune.system import processor_type
from ztune.text_cache import StoredTextEncoder, TextStore
from ztune.types import F32, ImageEncoder, Json

if TYPE_CHECKING:
    from runtimes.remote.connect import CheckedService
    from runtimes.remote.endpoint import Endpoint
    from runtimes.remote.served import ServerRuntime


_BATCH = 8


@dataclass
class OpenState:
    """Whether a model was closed, shared with its copies by `replace`."""

    closed: bool = False


@dataclass(frozen=True)
class Model:
    """A loaded bundle with its runtime, as `load` returns it.

    >>> import ztune
    >>> with ztune.load("models/mini", provider="cpu") as model:
    ...     images = model.encode_images(["examples/digits/seven/0007.png"])
    ...     texts = model.encode_texts(["a photo of the digit seven."])
    >>> images.shape, (images @ texts.T).shape
    ((1, 128), (1, 1))
    """

    bundle: Bundle
    execution: Execution
    """Provider and threads for graphs on this machine."""
    progress: Progress = SILENCE
    served: Runtime | None = None
    """The server that runs the bundle's graphs; None: this machine."""
    held: InMemoryImages = field(default_factory=dict)
    """Images in memory, by nominal path."""
    server: Mapping[str, Json] = field(default_factory=dict)
    """A server's settings as saved by a run, without secrets."""
    life: OpenState = field(default_factory=OpenState, repr=False)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sessions and the connection to a server."""
        self.life.closed = True
        self.__dict__.pop("_prompt_graph", None)  # its session and memory
        if self.served is not None:
            self.served.close()

    def require_open(self) -> None:
        """Raise ClosedError if the model was closed."""
        if self.life.closed:
            raise ClosedError(f"{self.where} is closed: load it again with ztune.load")

    def __deepcopy__(self, _memo: object) -> Model:
        """Return the model itself, so that copies of a classifier share it."""
        return self

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("a Model holds open sessions: load it in each process with ztune.load")

    @property
    def where(self) -> str:
        """The model's name in errors."""
        return self._runtime.where

    @property
    def runtime(self) -> Runtime:
        """The runtime of forward passes.

        Raises: ClosedError.
        """
        self.require_open()
        return self._runtime

    @cached_property
    def _runtime(self) -> Runtime:
        return self.served or LocalRuntime(self.bundle, self.execution)

    @property
    def capabilities(self) -> frozenset[str]:
        """What the runtime provides (`ztune.capabilities`)."""
        given = EVERYTHING - self.runtime.missing
        if self.served is None and self.bundle.visual is None:
            given -= {IMAGE_TOKENS}
        return given

    def images(self) -> ImageEncoder:
        """Return the image tower, opened on first use."""
        encoder = self.runtime.images()
        return InMemoryImageEncoder(encoder, self.bundle.image, self.held) if self.held else encoder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.bundle)

    @property
    def prompt_graph(self) -> PromptGraph:
        """The prompt graph, opened on first use, after the image tower was closed.

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
        views: Views = CENTRE,
        skip_broken: bool = False,
        extractor: Path | None = None,
    ) -> Features:
        """Encode images that are not cached, then close the tower.

        `extractor` is the ONNX file of another tower for the same pixels.
        """
        encoder = self.images()
        if extractor is not None:
            encoder = OrtExtractor(extractor, self.bundle, self.execution)
        with self.progress.activity(what, len(items) * len(views)) as ticker:
            result = encode_files(
                encoder,
                items,
                FeatureCache(cache) if isinstance(cache, Path) else cache,
                views=views,
                at_once=1 if extractor is not None else self.runtime.batches_at_once,
                progress=lambda done, _total: ticker.update(done),
                skip_broken=skip_broken,
            )
        if not result.kept.all():
            broken = [str(path) for (path, _), k in zip(items, result.kept, strict=True) if not k]
            warn(f"{what}: {len(broken)} broken images left out: {first_few(broken)}")
        if extractor is None:
            kept = [path for (path, _), keep in zip(items, result.kept, strict=True) if keep]
            result = replace(result, conversions=count_conversions(kept))
            report_conversions(result.conversions, what, self.progress)
        return result

    def encode_images(self, images: Sequence[ImageLike]) -> F32:
        """Return unit features f32[N, e] of paths, Pillow images or arrays u8[H, W, 3].

        They are the same bytes as in a run, since batches have a fixed size.

        Raises: DataError naming an unreadable image; ProviderError; ServerError; ClosedError.
        """
        if isinstance(images, str | Path):
            raise DataError("`images` is one path, expected a list of images")
        report_conversions(count_conversions(images), "images", self.progress)
        encoder, parts = self.images(), []
        for first in range(0, len(images), _BATCH):
            batch = images[first : first + _BATCH]
            cut = functools.partial(crop, spec=self.bundle.image)
            pixels = [with_image(image, f"image {first + n}", cut) for n, image in enumerate(batch)]
            pixels += pixels[:1] * (_BATCH - len(pixels))
            parts.append(encoder.encode(np.stack(pixels))[: len(batch)])
        if not parts:
            raise DataError("`images` is empty, expected at least one image")
        return np.concatenate(parts)

    def encode_texts(self, texts: Sequence[str]) -> F32:
        """Return unit features f32[N, e] of texts.

        Raises: DataError for a text too long for the tower; ServerError; ClosedError.
        """
        if isinstance(texts, str) or not len(texts):
            raise DataError("`texts` is one text or empty, expected a list of texts")
        # One by one: unlike class names, texts may be equal.
        return np.concatenate([self.prompt_graph.encode_template("{}", (text,)) for text in texts])

    def encode_templates(
        self,
        templates: Sequence[str],
        classes: tuple[str, ...],
        store: TextStore | None = None,
    ) -> F32:
        """Return unit features f32[C, e] of the classes, averaged over the templates.

        A template has {} for a class name. Features in `store` are not computed.

        Raises: DataError for a text too long for the tower; ServerError.
        """
        graph = self.prompt_graph
        if store is not None and isinstance(graph, OrtPromptGraph):
            wrap = functools.partial(StoredTextEncoder, store=store)
            each = [graph.encode_template(template, classes, wrap) for template in templates]
        else:
            each = [graph.encode_template(template, classes) for template in templates]
        if len(each) == 1:
            return each[0]
        mean: F32 = np.mean(each, axis=0)
        return np.asarray(mean / np.linalg.norm(mean, axis=-1, keepdims=True), dtype=np.float32)

    def text_store(self, cache: Path) -> TextStore | None:
        """Return the stored text features of this bundle on this machine in a cache folder.

        None for a server: the model behind a URL may change.
        """
        if self.served is not None:
            return None
        version = f"onnxruntime {onnxruntime().__version__}"
        identity = (self.bundle.digest, self.execution.provider, version, processor_type())
        return TextStore(cache / "texts", identity)

    def zero_shot(self, templates: Sequence[str], classes: tuple[str, ...]) -> FeatureClassifier:
        """Return the zero-shot classifier of templates: features f32[N, e] to f32[N, C].

        Raises: DataError for a text too long for the tower; ServerError.
        """
        texts = self.encode_templates(templates, classes)
        return classifier_of_texts(texts, self.bundle.logit_scale, self.bundle.logit_bias)

    def spec(self, n_extracted: int, n_images: int) -> ModelSpec:
        """Return what a method may know of the bundle and its `n_images` training images.

        `n_extracted` is the size of a decoder's input features.
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
            n_images=n_images,
        )

    def refresh(self, artifact: Artifact, classes: tuple[str, ...] | None = None) -> Artifact:
        """Recompute an artifact's text features with this bundle, for other classes if given.

        Raises: DataError for a head with other classes, or a bundle of another width.
        """
        found = self._of_classes(artifact, classes)
        test = inliers_of(artifact, found.classes)
        if inliers_of(artifact) is not None and test is None:
            warn(
                "no image is refused as none of the classes: the prototypes are of the classes "
                "that the artifact was tuned on, and there are other names"
            )
        if isinstance(found, VisualArtifact) or found.inliers is test:
            return found
        return replace(found, inliers=test)

    def _of_classes(self, artifact: Artifact, classes: tuple[str, ...] | None) -> Artifact:
        if isinstance(artifact, HeadArtifact):
            if artifact.weight.shape[1] != self.bundle.embed_dim:
                raise DataError(
                    f"the artifact has features of {artifact.weight.shape[1]} values, the bundle's "
                    f"image tower has {self.bundle.embed_dim} (use the bundle it was tuned on)"
                )
            if classes is None or set(classes) == set(artifact.classes):
                return artifact
            if not set(classes) <= set(artifact.classes):
                raise DataError(
                    "a head serves only the classes it was fitted on: "
                    f"{', '.join(artifact.classes)} (a tuned context serves any)"
                )
            return artifact.restricted(classes)
        wanted = classes or artifact.classes
        if isinstance(artifact, EnsembleArtifact):
            return self._refresh_ensemble(artifact, wanted)
        if isinstance(artifact, MixtureArtifact):
            if (
                artifact.provenance.bundle_digest == self.bundle.digest
                and wanted == artifact.classes
            ):
                return artifact  # encoding all prompts again gives the same
            if set(wanted) - set(artifact.classes):
                warn(
                    "a mixture's weights were fitted to the classes it was tuned on; with other "
                    "class names it may be worse than the hand-written prompt (compare both; "
                    "`method=auto` blends them)"
                )
            texts = self.mix(artifact, wanted)
        elif artifact.context is None:
            texts = self.encode_templates(artifact.templates, wanted)
        else:
            if artifact.context.shape[1] != self.bundle.text.width:
                raise DataError(
                    f"the context has {artifact.context.shape[1]} values per token, the bundle's "
                    f"text tower has {self.bundle.text.width}"
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

    def _refresh_ensemble(self, artifact: EnsembleArtifact, classes: tuple[str, ...]) -> Artifact:
        """Return an ensemble for some of its classes; for others its prompts, with templates."""
        mixture, e = artifact.mixture, artifact.head.weight.shape[1]
        if e != self.bundle.embed_dim:
            raise DataError(
                f"the artifact has features of {e} values, the bundle's image tower has "
                f"{self.bundle.embed_dim} (use the bundle it was tuned on)"
            )
        if classes == artifact.classes:
            return artifact
        if set(classes) <= set(artifact.classes):
            return artifact.restricted(classes)
        warn(
            "the heads know only the classes they were fitted to; with other names among them all "
            "classes get the hand-written prompt's text features, with a fifth of the tuned ones'"
        )
        texts = blend_for_other_classes(
            self.mix(mixture, classes), self.encode_templates(artifact.templates, classes)
        )
        return replace(
            mixture,
            classes=classes,
            text_features=texts,
            logit_scale=self.bundle.logit_scale,
            logit_bias=self.bundle.logit_bias,
        )

    def mix(self, artifact: MixtureArtifact, classes: tuple[str, ...]) -> F32:
        """Encode a mixture's prompts again and return its text features f32[C, e].

        Raises: DataError for a token that is not in this bundle's table.
        """
        tokens, at_once, table = artifact.tokens, artifact.at_once, token_table(self.bundle)
        if tokens.max() >= len(table):
            raise DataError(
                f"the mixture has token {tokens.max()}, the bundle's table ends at "
                f"{len(table) - 1} (use the bundle it was tuned on)"
            )
        encoder = self.prompt_graph.encoder(classes, tokens.shape[1], at_once)
        self.progress.remark(f"encoding {len(tokens)} prompts for {len(classes)} classes")
        contexts = embed(table, tokens.astype(np.int64))
        return mix_text_features(encoder, contexts, artifact.weights, at_once)


def load(
    place: Path | str,
    *,
    provider: str = "auto",
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress = SILENCE,
    **server: Json,
) -> Model:
    """Load a model from a bundle's folder or a server's URL.

    `provider` is auto, cpu, cuda or tensorrt; `threads` is the number of threads, without
    spin-waiting (None: all cores); `memory_limit` is the memory in MB of tuning's forward passes,
    without the weights. `progress` receives progress reports (ztune.progress.Progress). With a URL
    (`triton://host:8001/NAME`, `http://…`) further arguments are server settings: client, images,
    losses, deadline (s), give_up (s), tls_ca, token_file and so on (docs/remote.md). A Model is a
    context manager; its graphs are opened on use.

    Raises: FormatError for a folder that is not a bundle; ProviderError for a provider that does
        not run; ServerError; ConfigError.

    >>> import ztune
    >>> with ztune.load("models/mini", provider="cpu") as model:
    ...     model.encode_texts(["a photo of the digit seven."]).shape
    (1, 128)
    """
    if not is_url(place):
        if server:
            raise ConfigError(f"`{next(iter(server))}` requires a server's URL; leave it out")
        execution = resolve_execution(provider, threads, progress, memory_limit)
        return open_model(Path(place), execution, progress)
    own = ("client", "images", "losses")
    values: dict[str, Json] = {name: server.pop(name) for name in own if name in server}
    values["connection"] = dict(server)
    here = (provider, threads, memory_limit)
    if here[2] is not None or (values.get("images") != "local" and here != ("auto", None, None)):
        raise ConfigError(
            "the server decides how its graphs run: leave out `provider`, `threads` and "
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
    """Load a bundle; its graphs are opened on use.

    Raises: FormatError; ProviderError if the provider cannot run the bundle's precision.
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
    """Connect to a server, fetch the client half unless it is named, and check both.

    `values` are server settings, `named` is the server that may receive secrets.

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
    """Load a bundle on a server; `provider` and `threads` are those of a local image tower.

    Raises: ServerError, ConfigError; ProviderError if a local image tower cannot run.
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
    """Return a line with a server's bundle and capabilities."""
    service = served.service
    return (
        f"server {service.location}: bundle {served.bundle.digest[:12]}…, "
        f"{served.bundle.precision}; provides {describe(served.capabilities)}"
    )
