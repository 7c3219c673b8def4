"""A bundle whose graphs answer on a server: the same encoders and losses, over the wire."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from runtimes.bundle import Bundle
from runtimes.plan import Sizes, call_bytes
from runtimes.preprocess import PREPROCESS_VERSION, normalise, read_view
from runtimes.prompts import encoded_sentences, name_lengths, name_tokens
from runtimes.remote.contract import BATCH, IMAGE, PROMPT, SCORE
from runtimes.remote.service import KeptImages, Question, Service
from runtimes.remote.shared_memory import Expected
from runtimes.remote.transport import Array
from runtimes.tokenizer import Tokenizer
from ztune.access import CONTEXTS, EVERYTHING, FEATURES, IMAGE_TOKENS, LOGITS, LOSS, PIXELS, TEXTS
from ztune.errors import ConfigError, ServerError
from ztune.types import F32, I64, U8, Batch, ImageEncoder, Json, PromptEncoder, Prompts, Scores

# Bytes that one request may make a server take, and send over the wire: larger rounds are split.
_SERVER_BYTES, _WIRE_BYTES = 1_000_000_000, 64_000_000
# Bytes of a round's text features up to which losses are computed here: numbers of the same bits as
# of a local run are worth them.
_HERE_BYTES = 1_000_000
# Batches of images that are held for requests on their way: each some 5 MB.
_MOST_AT_ONCE = 16
LOSSES = ("auto", "here", "server")


@dataclass(frozen=True)
class RequestPlan:
    """How a round of candidates is cut into requests: fixed by sizes, never by timing."""

    n_candidates: int
    """Candidates in one request, at most; even unless it is 1, so that a ± pair is never parted."""
    n_servers: int
    losses: str
    """here: text features cross the wire; server: losses do."""
    image_features: str
    """Whether images' features are kept by the server or sent with every request."""

    def described(self) -> str:
        """Return the line that a person reads."""
        where = "here" if self.losses == "here" else "by the server"
        return (
            f"requests of up to {self.n_candidates} candidates; losses computed {where}, images' "
            f"features {self.image_features}"
        )

    def to_json(self) -> dict[str, Json]:
        """Return what run.json keeps of it."""
        return {
            "candidates": self.n_candidates,
            "servers": self.n_servers,
            "losses": self.losses,
            "image_features": self.image_features,
        }


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
    def withheld(self) -> frozenset[str]:
        return EVERYTHING - self.access

    @property
    def hint(self) -> str:
        if {PIXELS, IMAGE_TOKENS} & self.withheld and not self.withheld - {PIXELS, IMAGE_TOKENS}:
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

    def check_plan(self, names: Sequence[tuple[int, ...]], n_context: int, n: int) -> None:
        """Any round can be cut into requests."""

    def scorer(
        self, encoder: PromptEncoder, features: F32, labels: I64, *, logits: bool
    ) -> ServedScores | None:
        if not isinstance(encoder, ServedPromptEncoder) or encoder.plan.losses == "here":
            return None
        if logits and "logits" not in self.service.offers[SCORE].outputs:
            return None  # what gives text features gives logits
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
                Question(IMAGE, {"pixels": part}, {"features": Expected("FP32", (len(part), e))})
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

    def sentences(self, template: str, classes: Sequence[str]) -> F32:
        """Return the unit features f32[C, e] of a hand-written template filled with the classes.

        Raises: ConfigError for the template, DataError for a name.
        """
        service, bundle = self._service, self._bundle
        features = encoded_sentences(
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

    def _planned(self, n_candidates: int, losses: str) -> RequestPlan:
        n_servers = self.service.n_servers
        each = _even(math.ceil(n_candidates / n_servers)) if n_servers > 1 else n_candidates
        features = 4 * len(self.tokens) * self.bundle.embed_dim
        while each > 2 and (
            call_bytes(self._lengths, self._sizes, each) > _SERVER_BYTES
            or each * features > _WIRE_BYTES
        ):
            each = _even(each // 2)
        score = self.service.offers.get(SCORE)
        if losses == "auto":
            little = n_candidates * features <= _HERE_BYTES and PROMPT in self.service.offers
            losses = "here" if little or score is None else "server"
        images = "not sent"
        if losses == "server" and score is not None:
            images = "kept by the server" if score.keeps else "sent with every request"
        return RequestPlan(each, n_servers, losses, images)

    def parts(self, contexts: F32) -> list[F32]:
        """Return contexts f32[P, m, d] as the plan cuts them into requests."""
        step = self.plan.n_candidates
        return [
            np.ascontiguousarray(contexts[first : first + step], dtype=np.float32)
            for first in range(0, len(contexts), step)
        ]

    def encode(self, contexts: F32) -> F32:
        if PROMPT in self.service.offers:
            return self._encoded(contexts)
        if "logits" in self.service.offers[SCORE].outputs:
            return self._from_logits(contexts)
        raise ServerError(
            f"{self.service.location} gives no text features, losses alone (use the bundle itself)"
        )

    def _encoded(self, contexts: F32) -> F32:
        C, e = len(self.tokens), self.bundle.embed_dim
        answers = self.service.ask(
            [
                Question(
                    PROMPT,
                    {"contexts": part, "tokens": self.tokens},
                    {"features": Expected("FP32", (len(part), C, e))},
                    len(part),
                )
                for part in self.parts(contexts)
            ]
        )
        features = np.concatenate([answer["features"] for answer in answers])
        return np.ascontiguousarray(features[:, self.places])

    def _from_logits(self, contexts: F32) -> F32:
        """Score the unit vectors of feature space: their logits are the texts' features."""
        C, e = len(self.tokens), self.bundle.embed_dim
        basis: dict[str, Array] = {
            "features": np.eye(e, dtype=np.float32),
            "labels": np.zeros(e, dtype=np.int64),
        }
        answers = self.service.ask(
            [
                Question(
                    SCORE,
                    {"contexts": part, "tokens": self.tokens, **basis},
                    {"logits": Expected("FP32", (len(part), e, C))},
                    len(part),
                )
                for part in self.parts(contexts)
            ]
        )
        logits = np.concatenate([answer["logits"] for answer in answers]).astype(np.float64)
        features = (logits - self.bundle.logit_bias) / self.bundle.logit_scale
        features = features.transpose(0, 2, 1)[:, self.places]
        return np.ascontiguousarray(features, dtype=np.float32)


class ServedScores:
    """Losses computed by the server, so that features of texts do not cross the wire (a Scorer)."""

    def __init__(self, encoder: ServedPromptEncoder, features: F32, labels: I64, *, logits: bool):
        """Keep unit features f32[V, N, e] and labels i64[N] of the images."""
        self._encoder = encoder
        self._n_images, self._logits = len(labels), logits
        table = np.ascontiguousarray(features.reshape(-1, features.shape[-1]), dtype=np.float32)
        own = np.tile(encoder.places[labels], len(features))
        self._kept = KeptImages.of(table, own)
        self._keeps = encoder.service.offers[SCORE].keeps

    def __call__(self, prompts: Prompts, batch: Batch, labels: I64) -> Scores:
        if prompts.contexts is None or prompts.visual is not None:
            raise ConfigError("the server scores contexts alone, no visual prompts")
        encoder, kept, n = self._encoder, self._kept, len(batch.images)
        rows = batch.views * self._n_images + batch.images
        images: dict[str, Array]
        if self._keeps:
            images = {"kept": np.frombuffer(kept.name, dtype=np.uint8), "rows": rows}
        else:
            images = {"features": kept.features[rows], "labels": kept.labels[rows]}
        questions = []
        for part in encoder.parts(prompts.contexts):
            P = len(part)
            outputs = {"losses": Expected("FP64", (P,)), "correct": Expected("INT64", (P,))}
            if self._logits:
                outputs["logits"] = Expected("FP32", (P, n, len(encoder.tokens)))
            questions.append(
                Question(
                    SCORE,
                    {"contexts": part, "tokens": encoder.tokens, **images},
                    outputs,
                    P,
                    kept if self._keeps else None,
                )
            )
        answers = encoder.service.ask(questions)
        correct = np.concatenate([answer["correct"] for answer in answers])
        if ((correct < 0) | (correct > n)).any():
            raise ServerError(f"{encoder.service.location}: more images right than there are")
        losses = np.concatenate([answer["losses"] for answer in answers])
        logits = None
        if self._logits:
            found = np.concatenate([answer["logits"] for answer in answers])
            sound = np.isfinite(found).all(axis=(1, 2))
            if not sound[np.isfinite(losses)].all():
                raise ServerError(
                    f"{encoder.service.location}: logits that are not finite beside losses that are"
                )
            logits = np.ascontiguousarray(found[..., encoder.places])
        return Scores(losses, correct / n, logits)


def _even(n: int) -> int:
    return max(2, n + n % 2)
