"""The runtime of a served bundle: the same encoders and losses, over the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL

from runtimes.bundle import Bundle
from runtimes.plan import Sizes, call_bytes
from runtimes.preprocess import PREPROCESS_VERSION, normalise, read_view
from runtimes.prompts import encode_template, name_lengths, name_tokens
from runtimes.remote.contract import BATCH, IMAGE, PROMPT, SCORE, Tensor, Tensors
from runtimes.remote.service import ModelRequest, Service
from runtimes.remote.transport import Array
from runtimes.tokenizer import Tokenizer
from ztune.capabilities import (
    CONTEXTS,
    EVERYTHING,
    FEATURES,
    IMAGE_TOKENS,
    LOGITS,
    LOSS,
    PIXELS,
    TEXTS,
)
from ztune.errors import ConfigError, ServerError
from ztune.types import (
    F32,
    I64,
    U8,
    Batch,
    ImageEncoder,
    Json,
    PromptEncoder,
    Prompts,
    RandomView,
    Scores,
)

# Limits of one request, in bytes of server memory and of its answer: larger rounds are split.
_SERVER_BYTES, _ANSWER_BYTES = 1_000_000_000, 64_000_000
# Bytes of a round's text features up to which `auto` computes losses on the client, equal to
# a local run's.
_CLIENT_BYTES = 1_000_000
# Maximum image batches of concurrent requests: some 5 MB each.
_MOST_AT_ONCE = 16
_F32 = 4
LOSSES = ("auto", "here", "server")


@dataclass(frozen=True)
class RequestPlan:
    """How a round of candidates is split into requests: depends on sizes, never on timing."""

    n_candidates: int
    """Maximum candidates per request; even unless 1, to keep ± pairs together."""
    losses: str
    """here: the server sends text features; server: it sends losses."""
    n_bytes: int
    """Maximum bytes of a request's tensors."""

    def describe(self) -> str:
        """Return a line for the user."""
        where = "here" if self.losses == "here" else "by the server"
        return (
            f"requests of up to {self.n_candidates} candidates, {self.n_bytes / 1e6:.3g} MB each; "
            f"losses computed {where}"
        )

    def to_json(self) -> dict[str, Json]:
        """Return the part that run.json saves."""
        return {"candidates": self.n_candidates, "losses": self.losses}


class ServerRuntime:
    """A bundle's models on a server (a Runtime)."""

    provider = "server"

    @property
    def where(self) -> str:
        return f"the bundle of server {self.service.location}"

    @property
    def place(self) -> str:
        return str(self.service.location)

    def __init__(
        self,
        service: Service,
        bundle: Bundle,
        images: ImageEncoder | None = None,
        losses: str = "auto",
    ):
        """Wrap a started service.

        `images` is a local image tower; `losses` one of LOSSES: auto is here for small rounds if
        the server offers text features, otherwise server.

        Raises: ConfigError for losses that the server's models do not allow.
        """
        self.service, self.bundle = service, bundle
        self._images, self._losses = images, losses
        if losses not in LOSSES:
            raise ConfigError(f'`losses` is "{losses}", expected {", ".join(LOSSES)}')
        if losses == "here" and TEXTS not in self.capabilities:
            raise ConfigError(
                "`losses=here` needs text features; the server offers none (use `losses=server`)"
            )
        if losses == "server" and SCORE not in service.offers:
            raise ConfigError(
                f'`losses=server` needs the model "{service.model(SCORE)}", which the server lacks'
            )

    def close(self) -> None:
        self.service.close()

    @property
    def capabilities(self) -> frozenset[str]:
        """Capabilities of the server and the local image tower together."""
        offers, given = self.service.offers, set[str]()
        if PROMPT in offers:
            given |= {LOSS, CONTEXTS, LOGITS, TEXTS}
        if SCORE in offers:
            given |= {LOSS, CONTEXTS}
            if "logits" in offers[SCORE].outputs:
                # The logits of unit vectors are the text features.
                given |= {LOGITS, TEXTS}
        if IMAGE in offers or self._images is not None:
            given.add(FEATURES)
        return frozenset(given)

    @property
    def missing(self) -> frozenset[str]:
        return EVERYTHING - self.capabilities

    @property
    def hint(self) -> str:
        if {PIXELS, IMAGE_TOKENS} & self.missing and not self.missing - {PIXELS, IMAGE_TOKENS}:
            return "visual prompts need a local bundle"
        return "the server does not offer more"

    @property
    def batches_at_once(self) -> int:
        if self._images is not None:
            return 1
        return min(_MOST_AT_ONCE, self.service.connection.max_inflight)

    def images(self) -> ImageEncoder:
        if self._images is not None:
            return self._images
        if IMAGE not in self.service.offers:
            raise ServerError(
                f"{self.service.location} offers no image features (encode images locally "
                "with `images=local` and `client=BUNDLE`, a bundle with image.onnx)"
            )
        return ServerImageEncoder(self.service, self.bundle)

    def prompts(self, tokenizer: Tokenizer) -> ServerPromptGraph:
        return ServerPromptGraph(self.service, self.bundle, tokenizer, self._losses)

    def check_plan(
        self, names: Sequence[tuple[int, ...]], n_context: int, n: int, n_images: int = 0
    ) -> None:
        encoder = ServerPromptEncoder(self.service, self.bundle, names, n_context, n, self._losses)
        if encoder.plan.losses == "server":
            encoder.plan_images(n_images)
        if FEATURES not in self.missing:
            self.images()  # refuses images that are too large

    def scorer(
        self, encoder: PromptEncoder, features: F32, labels: I64, *, logits: bool
    ) -> ServerScorer | None:
        if not isinstance(encoder, ServerPromptEncoder) or encoder.plan.losses == "here":
            return None
        if logits and "logits" not in self.service.offers[SCORE].outputs:
            return None  # logits come from text features then
        encoder.plan_images(len(labels))
        return ServerScorer(encoder, features, labels, logits=logits)


class ServerImageEncoder:
    """The image tower on a server (an ImageEncoder).

    Raises: ConfigError if its requests are above `max_request`.
    """

    def __init__(self, service: Service, bundle: Bundle):
        self._service, self._bundle = service, bundle
        # Dynamic int8 scales activations over a whole call, so images are encoded one by one.
        self._at_once = 1 if bundle.precision == "int8" else BATCH
        n_bytes = self._at_once * 3 * bundle.image.size**2 * _F32
        _require_size(service, f"{self._at_once} image(s)", n_bytes, ["`images=local`"])

    @property
    def identity(self) -> str:
        bundle = self._bundle
        return "|".join(
            (
                f"served {bundle.digest}",
                repr(bundle.image),
                bundle.precision,
                f"preprocess {PREPROCESS_VERSION}",
                f"pillow {PIL.__version__}",
            )
        )

    def read(self, path: Path, view: RandomView | None) -> U8:
        return read_view(path, self._bundle.image, view)

    def encode(self, pixels: U8) -> F32:
        ready = normalise(pixels, self._bundle.image)
        parts = [ready[i : i + self._at_once] for i in range(0, len(ready), self._at_once)]
        e = self._bundle.embed_dim
        answers = self._service.infer(
            [
                ModelRequest(IMAGE, {"pixels": part}, {"features": Tensor("FP32", (len(part), e))})
                for part in parts
            ]
        )
        return np.concatenate([answer["features"] for answer in answers])


class ServerPromptGraph:
    """The text tower on a server (a PromptGraph)."""

    def __init__(self, service: Service, bundle: Bundle, tokenizer: Tokenizer, losses: str):
        self._service, self._bundle, self._tokenizer = service, bundle, tokenizer
        self._losses = losses

    def encoder(
        self, classes: Sequence[str], n_context: int, n_candidates: int
    ) -> ServerPromptEncoder:
        """Return the encoder of contexts of `n_context` tokens before fixed class names.

        Raises: DataError when a name is too long for the tower or two names have the same tokens.
        """
        names = name_tokens(self._bundle.text, self._tokenizer, classes, n_context)
        return ServerPromptEncoder(
            self._service, self._bundle, names, n_context, n_candidates, self._losses
        )

    def encode_template(self, template: str, classes: Sequence[str]) -> F32:
        """Return the unit features f32[C, e] of a hand-written template filled with the classes.

        Raises: ConfigError for the template, DataError for a name.
        """
        service, bundle = self._service, self._bundle
        features = encode_template(
            bundle,
            self._tokenizer,
            template,
            classes,
            lambda names, n: ServerPromptEncoder(service, bundle, names, n, 1),
        )
        if not np.isfinite(features).all():
            raise ServerError(
                f"{self._service.location}: text features of a template are not finite"
            )
        return features


class ServerPromptEncoder:
    """The prompt model for fixed class names (a TextEncoder)."""

    cuda_graph = None

    def __init__(
        self,
        service: Service,
        bundle: Bundle,
        names: Sequence[tuple[int, ...]],
        n_context: int,
        n_candidates: int,
        losses: str = "auto",
    ):
        self.service, self.bundle = service, bundle
        spec = bundle.text
        self._sizes = Sizes(n_context, spec.width, bundle.embed_dim, spec.graph == "prefix")
        lengths = np.array(name_lengths(spec, names), dtype=np.int64)
        # In the order of a local graph, for equal rounding.
        order = np.argsort(lengths, kind="stable")
        rows = [(*names[index], *spec.suffix_ids) for index in order]
        self.tokens: I64 = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
        for row, ids in zip(self.tokens, rows, strict=True):
            row[: len(ids)] = ids
        self.class_columns: I64 = np.argsort(order).astype(np.int64)
        """The column of each class in a request."""
        self._lengths = lengths
        self.plan = self._make_plan(n_candidates, losses)
        score = None if PROMPT in service.offers else service.offers.get(SCORE)
        self._n_vectors = bundle.embed_dim if score and "logits" in score.outputs else 0
        """Unit vectors in requests of `_from_logits`."""
        self.plan_images(0)

    def _make_plan(self, n_candidates: int, losses: str) -> RequestPlan:
        each, features = n_candidates, _F32 * len(self.tokens) * self.bundle.embed_dim
        while each > 2 and (
            call_bytes(self._lengths, self._sizes, each) > _SERVER_BYTES
            or each * features > _ANSWER_BYTES
        ):
            each = max(2, each // 2 + each // 2 % 2)
        if losses == "auto":
            offers = self.service.offers
            small = n_candidates * features <= _CLIENT_BYTES and PROMPT in offers
            losses = "here" if small or SCORE not in offers else "server"
        return RequestPlan(each, losses, 0)

    def plan_images(self, n_images: int) -> None:
        """Size the plan's requests for the features and labels of up to `n_images` images.

        Raises: ConfigError above `max_request`.
        """
        plan = self.plan
        contexts = _F32 * plan.n_candidates * self._sizes.n_context * self._sizes.width
        n_rows = max(n_images, self._n_vectors)
        images = n_rows * (_F32 * self.bundle.embed_dim + self.tokens.itemsize)
        n_bytes = contexts + self.tokens.nbytes + images
        ways = ["`losses=here`"] if n_images and PROMPT in self.service.offers else []
        ways += ["fewer images"] if n_images > self._n_vectors else []
        rows = "images" if n_images >= self._n_vectors else "unit vectors"
        what = f"{plan.n_candidates} candidates and {n_rows} {rows}"
        _require_size(self.service, what, n_bytes, ways)
        self.plan = replace(plan, n_bytes=max(plan.n_bytes, n_bytes))

    def parts(self, contexts: F32) -> list[F32]:
        """Split contexts f32[P, m, d] into the plan's requests."""
        step = self.plan.n_candidates
        return [
            np.ascontiguousarray(contexts[first : first + step], dtype=np.float32)
            for first in range(0, len(contexts), step)
        ]

    def encode(self, contexts: F32) -> F32:
        if PROMPT in self.service.offers:
            shape = len(self.tokens), self.bundle.embed_dim
            answer = self.infer(PROMPT, contexts, {}, {"features": Tensor("FP32", shape)})
            features = answer["features"]
        elif "logits" in self.service.offers[SCORE].outputs:
            features = self._from_logits(contexts)
        else:
            raise ServerError(
                f"{self.service.location} offers losses, but no text features (use the bundle)"
            )
        return np.ascontiguousarray(features[:, self.class_columns])

    def _from_logits(self, contexts: F32) -> F32:
        """Score unit vectors as images: their logits are the text features."""
        C, e = len(self.tokens), self.bundle.embed_dim
        basis: dict[str, Array] = {
            "features": np.eye(e, dtype=np.float32),
            "labels": np.zeros(e, dtype=np.int64),
        }
        answer = self.infer(SCORE, contexts, basis, {"logits": Tensor("FP32", (e, C))})
        logits = answer["logits"].astype(np.float64)
        features = (logits - self.bundle.logit_bias) / self.bundle.logit_scale
        return np.asarray(features.transpose(0, 2, 1), dtype=np.float32)

    def infer(
        self, part: str, contexts: F32, inputs: Mapping[str, Array], outputs: Tensors
    ) -> dict[str, Array]:
        """Send contexts f32[P, m, d] in the plan's requests; return the joined outputs.

        `outputs` are those of one candidate; the joined ones have P rows.
        """
        requests = [
            ModelRequest(
                part,
                {"contexts": some, "tokens": self.tokens, **inputs},
                {k: Tensor(v.datatype, (len(some), *v.shape)) for k, v in outputs.items()},
                len(some),
            )
            for some in self.parts(contexts)
        ]
        answers = self.service.infer(requests)
        return {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}


class ServerScorer:
    """Losses computed by the server, which sends no text features (a Scorer)."""

    def __init__(self, encoder: ServerPromptEncoder, features: F32, labels: I64, *, logits: bool):
        """Keep unit features f32[V, N, e] and labels i64[N] of the images."""
        self._encoder, self._logits = encoder, logits
        self._features = np.ascontiguousarray(features, dtype=np.float32)
        self._labels = encoder.class_columns[labels]

    def __call__(self, prompts: Prompts, batch: Batch, labels: I64) -> Scores:
        if prompts.contexts is None or prompts.visual is not None:
            raise ConfigError("the server scores only contexts, not visual prompts")
        encoder, n = self._encoder, len(batch.images)
        images: dict[str, Array] = {
            "features": self._features[batch.views, batch.images],
            "labels": self._labels[batch.images],
        }
        outputs = {"losses": Tensor("FP64", ()), "correct": Tensor("INT64", ())}
        if self._logits:
            outputs["logits"] = Tensor("FP32", (n, len(encoder.tokens)))
        answer = encoder.infer(SCORE, prompts.contexts, images, outputs)
        losses, correct = answer["losses"], answer["correct"]
        if ((correct < 0) | (correct > n)).any():
            raise ServerError(
                f"{encoder.service.location}: invalid number of correct images, expected 0 to {n}"
            )
        logits = None
        if self._logits:
            found = answer["logits"]
            sound = np.all(np.isfinite(found), axis=(1, 2))
            if not sound[np.isfinite(losses)].all():
                raise ServerError(
                    f"{encoder.service.location}: logits are not finite, but losses are"
                )
            logits = np.ascontiguousarray(found[..., encoder.class_columns])
        return Scores(losses, correct / n, logits)


def _require_size(service: Service, what: str, n_bytes: int, ways: Sequence[str]) -> None:
    """Raise ConfigError for requests above `max_request`; `ways` are what else to use."""
    limit = service.connection.max_request
    if n_bytes > limit * 1_000_000:
        listed = " or ".join([*ways, "a larger `max_request` if the server accepts it"])
        raise ConfigError(
            f"a request of {what} takes {n_bytes / 1e6:.3g} MB, more than `max_request` {limit:g} "
            f"(use {listed})"
        )
