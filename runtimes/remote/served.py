"""A bundle whose graphs answer on a server: the same encoders and losses, over the wire."""

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
from runtimes.remote.service import Question, Service
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
from ztune.types import F32, I64, U8, Batch, ImageEncoder, Json, PromptEncoder, Prompts, Scores

# Bytes that one request may make a server use, and answer: larger rounds are split.
_SERVER_BYTES, _ANSWER_BYTES = 1_000_000_000, 64_000_000
# Bytes of a round's text features up to which losses are computed here: numbers of the same bits as
# of a local run are worth them.
_HERE_BYTES = 1_000_000
# Batches of images that are held for requests on their way: each some 5 MB.
_MOST_AT_ONCE = 16
_F32 = 4
LOSSES = ("auto", "here", "server")


@dataclass(frozen=True)
class RequestPlan:
    """How a round of candidates is cut into requests: fixed by sizes, never by timing."""

    n_candidates: int
    """Candidates in one request, at most; even unless it is 1, so that a ± pair is never parted."""
    losses: str
    """here: text features cross the wire; server: losses do."""
    n_bytes: int
    """Of one request's tensors, at most."""

    def described(self) -> str:
        """Return the line that a person reads."""
        where = "here" if self.losses == "here" else "by the server"
        return (
            f"requests of up to {self.n_candidates} candidates, {self.n_bytes / 1e6:.3g} MB each; "
            f"losses computed {where}"
        )

    def to_json(self) -> dict[str, Json]:
        """Return what run.json keeps of it."""
        return {"candidates": self.n_candidates, "losses": self.losses}


class Served:
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
        """Take a service that was started.

        `images` is an image tower of this machine's own; `losses` one of LOSSES: auto is here for
        rounds of little text, where the server gives its features, and else the server.

        Raises: ConfigError for losses where the server gives nothing to compute them from.
        """
        self.service, self.bundle = service, bundle
        self._images, self._losses = images, losses
        if losses not in LOSSES:
            raise ConfigError(f'`losses` is "{losses}", expected {", ".join(LOSSES)}')
        if losses == "here" and TEXTS not in self.access:
            raise ConfigError("`losses=here`: the server gives no text features")
        if losses == "server" and SCORE not in service.offers:
            raise ConfigError(f'`losses=server`: there is no model "{service.model(SCORE)}"')

    def close(self) -> None:
        self.service.close()

    @property
    def access(self) -> frozenset[str]:
        """What the server gives, and this machine beside it."""
        offers, given = self.service.offers, set[str]()
        if PROMPT in offers:
            given |= {LOSS, CONTEXTS, LOGITS, TEXTS}
        if SCORE in offers:
            given |= {LOSS, CONTEXTS}
            if "logits" in offers[SCORE].outputs:
                # Features of one's own choosing scored by logits are the texts' features.
                given |= {LOGITS, TEXTS}
        if IMAGE in offers or self._images is not None:
            given.add(FEATURES)
        return frozenset(given)

    @property
    def missing(self) -> frozenset[str]:
        return EVERYTHING - self.access

    @property
    def hint(self) -> str:
        if {PIXELS, IMAGE_TOKENS} & self.missing and not self.missing - {PIXELS, IMAGE_TOKENS}:
            return "visual prompts are tuned on a bundle of one's own"
        return "this is what the server offers"

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
                f"{self.service.location} offers no image features (encode images here with "
                "`images=local` and `client=BUNDLE`, a bundle with image.onnx)"
            )
        return ServedImages(self.service, self.bundle)

    def prompts(self, tokenizer: Tokenizer) -> ServedPromptGraph:
        return ServedPromptGraph(self.service, self.bundle, tokenizer, self._losses)

    def check_plan(
        self, names: Sequence[tuple[int, ...]], n_context: int, n: int, n_images: int = 0
    ) -> None:
        encoder = ServedPromptEncoder(self.service, self.bundle, names, n_context, n, self._losses)
        if encoder.plan.losses == "server":
            encoder.plan_images(n_images)

    def scorer(
        self, encoder: PromptEncoder, features: F32, labels: I64, *, logits: bool
    ) -> ServedScores | None:
        if not isinstance(encoder, ServedPromptEncoder) or encoder.plan.losses == "here":
            return None
        if logits and "logits" not in self.service.offers[SCORE].outputs:
            return None  # what gives text features gives logits
        encoder.plan_images(len(labels))
        return ServedScores(encoder, features, labels, logits=logits)


class ServedImages:
    """The image tower on a server (an ImageEncoder)."""

    def __init__(self, service: Service, bundle: Bundle):
        self._service, self._bundle = service, bundle
        # Dynamic int8 scales activations over a whole call: an image has no company.
        self._at_once = 1 if bundle.precision == "int8" else BATCH

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

    def read(self, path: Path, view: np.random.Generator | None) -> U8:
        return read_view(path, self._bundle.image, view)

    def encode(self, pixels: U8) -> F32:
        ready = normalise(pixels, self._bundle.image)
        parts = [ready[i : i + self._at_once] for i in range(0, len(ready), self._at_once)]
        e = self._bundle.embed_dim
        answers = self._service.ask(
            [
                Question(IMAGE, {"pixels": part}, {"features": Tensor("FP32", (len(part), e))})
                for part in parts
            ]
        )
        return np.concatenate([answer["features"] for answer in answers])


class ServedPromptGraph:
    """The text tower on a server (a PromptGraph)."""

    def __init__(self, service: Service, bundle: Bundle, tokenizer: Tokenizer, losses: str):
        self._service, self._bundle, self._tokenizer = service, bundle, tokenizer
        self._losses = losses

    def encoder(
        self, classes: Sequence[str], n_context: int, n_candidates: int
    ) -> ServedPromptEncoder:
        """Return the encoder of contexts of `n_context` tokens before fixed class names.

        Raises: DataError when a name is too long for the tower or two names have the same tokens.
        """
        names = name_tokens(self._bundle.text, self._tokenizer, classes, n_context)
        return ServedPromptEncoder(
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
            lambda names, n: ServedPromptEncoder(service, bundle, names, n, 1),
        )
        if not np.isfinite(features).all():
            raise ServerError(
                f"{self._service.location}: text features of a hand-written prompt are not finite"
            )
        return features


class ServedPromptEncoder:
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
        # As a local graph has them, so that its sums are the same ones.
        order = np.argsort(lengths, kind="stable")
        rows = [(*names[index], *spec.suffix_ids) for index in order]
        self.tokens: I64 = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
        for row, ids in zip(self.tokens, rows, strict=True):
            row[: len(ids)] = ids
        self.places: I64 = np.argsort(order).astype(np.int64)
        """Where each class stands in a request."""
        self._lengths = lengths
        self.plan = self._planned(n_candidates, losses)
        self.plan_images(0)

    def _planned(self, n_candidates: int, losses: str) -> RequestPlan:
        each, features = n_candidates, _F32 * len(self.tokens) * self.bundle.embed_dim
        while each > 2 and (
            call_bytes(self._lengths, self._sizes, each) > _SERVER_BYTES
            or each * features > _ANSWER_BYTES
        ):
            each = max(2, each // 2 + each // 2 % 2)
        if losses == "auto":
            offers = self.service.offers
            little = n_candidates * features <= _HERE_BYTES and PROMPT in offers
            losses = "here" if little or SCORE not in offers else "server"
        return RequestPlan(each, losses, 0)

    def plan_images(self, n_images: int) -> None:
        """Size the plan's requests for the features and labels of up to `n_images` images.

        Raises: ConfigError above `max_request`.
        """
        plan, limit = self.plan, self.service.connection.max_request
        contexts = _F32 * plan.n_candidates * self._sizes.n_context * self._sizes.width
        images = n_images * (_F32 * self.bundle.embed_dim + self.tokens.itemsize)
        n_bytes = contexts + self.tokens.nbytes + images
        if n_bytes > limit * 1_000_000:
            ways = ["`losses=here`"] if n_images and PROMPT in self.service.offers else []
            ways += ["fewer images"] if n_images else []
            ways += ["a larger `max_request` if the server accepts it"]
            raise ConfigError(
                f"a request of {plan.n_candidates} candidates and {n_images} images takes "
                f"{n_bytes / 1e6:.3g} MB, more than `max_request` {limit:g} "
                f"(use {' or '.join(ways)})"
            )
        self.plan = replace(plan, n_bytes=max(plan.n_bytes, n_bytes))

    def parts(self, contexts: F32) -> list[F32]:
        """Return contexts f32[P, m, d] as the plan cuts them into requests."""
        step = self.plan.n_candidates
        return [
            np.ascontiguousarray(contexts[first : first + step], dtype=np.float32)
            for first in range(0, len(contexts), step)
        ]

    def encode(self, contexts: F32) -> F32:
        if PROMPT in self.service.offers:
            shape = len(self.tokens), self.bundle.embed_dim
            answer = self.ask(PROMPT, contexts, {}, {"features": Tensor("FP32", shape)})
            features = answer["features"]
        elif "logits" in self.service.offers[SCORE].outputs:
            features = self._from_logits(contexts)
        else:
            raise ServerError(
                f"{self.service.location} gives no text features, losses alone (use the bundle "
                "itself)"
            )
        return np.ascontiguousarray(features[:, self.places])

    def _from_logits(self, contexts: F32) -> F32:
        """Score the unit vectors of feature space: their logits are the texts' features."""
        C, e = len(self.tokens), self.bundle.embed_dim
        basis: dict[str, Array] = {
            "features": np.eye(e, dtype=np.float32),
            "labels": np.zeros(e, dtype=np.int64),
        }
        answer = self.ask(SCORE, contexts, basis, {"logits": Tensor("FP32", (e, C))})
        logits = answer["logits"].astype(np.float64)
        features = (logits - self.bundle.logit_bias) / self.bundle.logit_scale
        return np.asarray(features.transpose(0, 2, 1), dtype=np.float32)

    def ask(
        self, part: str, contexts: F32, inputs: Mapping[str, Array], outputs: Tensors
    ) -> dict[str, Array]:
        """Return what a model answers to contexts f32[P, m, d], asked in the plan's requests.

        `outputs` are those of one candidate; in the answer they have P rows.
        """
        questions = [
            Question(
                part,
                {"contexts": some, "tokens": self.tokens, **inputs},
                {k: Tensor(v.datatype, (len(some), *v.shape)) for k, v in outputs.items()},
                len(some),
            )
            for some in self.parts(contexts)
        ]
        answers = self.service.ask(questions)
        return {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}


class ServedScores:
    """Losses computed by the server, so that features of texts do not cross the wire (a Scorer)."""

    def __init__(self, encoder: ServedPromptEncoder, features: F32, labels: I64, *, logits: bool):
        """Keep unit features f32[V, N, e] and labels i64[N] of the images."""
        self._encoder, self._logits = encoder, logits
        self._features = np.ascontiguousarray(features, dtype=np.float32)
        self._labels = encoder.places[labels]

    def __call__(self, prompts: Prompts, batch: Batch, labels: I64) -> Scores:
        if prompts.contexts is None or prompts.visual is not None:
            raise ConfigError("the server scores contexts alone, no visual prompts")
        encoder, n = self._encoder, len(batch.images)
        images: dict[str, Array] = {
            "features": self._features[batch.views, batch.images],
            "labels": self._labels[batch.images],
        }
        outputs = {"losses": Tensor("FP64", ()), "correct": Tensor("INT64", ())}
        if self._logits:
            outputs["logits"] = Tensor("FP32", (n, len(encoder.tokens)))
        answer = encoder.ask(SCORE, prompts.contexts, images, outputs)
        losses, correct = answer["losses"], answer["correct"]
        if ((correct < 0) | (correct > n)).any():
            raise ServerError(f"{encoder.service.location}: more images right than there are")
        logits = None
        if self._logits:
            found = answer["logits"]
            sound = np.all(np.isfinite(found), axis=(1, 2))
            if not sound[np.isfinite(losses)].all():
                raise ServerError(
                    f"{encoder.service.location}: logits that are not finite beside losses that are"
                )
            logits = np.ascontiguousarray(found[..., encoder.places])
        return Scores(losses, correct / n, logits)
