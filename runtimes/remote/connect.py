"""A server at the start of a run: is it there, is it the right one, and how is it best asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.bundle import PARITY, Bundle, TextSpec
from runtimes.ort import allowed_difference, parity_inputs
from runtimes.prompts import group_by_prefix, token_table
from runtimes.remote.client_half import Progress, client_half
from runtimes.remote.contract import IMAGE, PROMPT, SCORE, TEXT, Tensor, check_offer
from runtimes.remote.endpoint import Connection, parse_location
from runtimes.remote.service import Ask, Question, Service
from runtimes.remote.transport import Array
from ztune.errors import ServerError
from ztune.types import F32, I64

Remark = Callable[[str], None]


@dataclass(frozen=True)
class Connected:
    """A service that was checked, and the client half of its bundle."""

    service: Service
    bundle: Bundle
    parity: dict[str, float]
    """Largest difference from torch's figures by model, as measured over the wire."""


def connect(
    url: str,
    connection: Connection,
    client: Path | None,
    remark: Remark,
    progress: Progress,
) -> Connected:
    """Reach a server and see that it serves what the client half says.

    Raises: ConfigError for addresses and settings, ServerError for whatever is wrong at the server.
    """
    location = parse_location(url)
    service = Service(location, connection, remark)
    try:
        service.start()
        bundle = client_half(service, client, progress)
        for part, offer in service.offers.items():
            check_offer(part, offer, bundle, f'{location}: model "{service.model(part)}"')
        service.digest = bytes.fromhex(bundle.digest)
        parity = probe(service, bundle, lambda question: service.ask([question])[0])
        service.prove = lambda ask: probe(service, bundle, ask)
        silent = [service.model(p) for p, o in service.offers.items() if not o.tells_digest]
        if silent:
            remark(
                f"{', '.join(silent)} do not say which bundle answers: only figures kept in the "
                "client half prove it, at the start and when a server comes back"
            )
    except BaseException:
        service.close()
        raise
    return Connected(service, bundle, parity)


def probe(service: Service, bundle: Bundle, ask: Ask) -> dict[str, float]:
    """Ask models what torch's answers are known of; return the largest differences.

    Raises: ServerError when one is too far off.
    """
    found: dict[str, float] = {}
    given, expected = parity_inputs(bundle.file(PARITY), IMAGE)
    if IMAGE in service.offers:
        found[IMAGE] = _each(ask, IMAGE, "pixels", given["pixels"], expected)
    given, expected = parity_inputs(bundle.file(PARITY), TEXT)
    sentences = given["tokens"]
    if TEXT in service.offers:
        found[TEXT] = _each(ask, TEXT, "tokens", sentences, expected)
    found |= _probe_prompts(service, bundle, ask, sentences, expected)
    for part, difference in found.items():
        limit = allowed_difference(bundle.parity["prompt" if part == SCORE else part]["max_abs"])
        limit *= bundle.logit_scale if part == SCORE else 1
        if not difference <= limit:
            raise ServerError(
                f'{service.location}: model "{service.model(part)}" differs from torch by '
                f"{difference:.1e}, more than {limit:.1e}: it is another model, or its server "
                "cannot be trusted"
            )
    return found


def _each(ask: Ask, part: str, name: str, rows: Array, expected: F32) -> float:
    """Return the largest difference from features f32[N, e], each row asked for by itself."""
    worst = 0.0
    for row, features in zip(rows, expected, strict=True):
        wanted = {"features": Tensor("FP32", (1, len(features)))}
        answer = ask(Question(part, {name: row[None]}, wanted))
        worst = _larger(worst, _difference(answer["features"][0], features))
    return worst


def _probe_prompts(
    service: Service, bundle: Bundle, ask: Ask, sentences: I64, expected: F32
) -> dict[str, float]:
    """Ask for known sentences as contexts (the words they begin with) before names (the rest)."""
    spec, found = bundle.text, dict[str, float]()
    texts = [_text_of(spec, row) for row in sentences]
    table, e = token_table(bundle), bundle.embed_dim
    for indices, start, rests in group_by_prefix([text for text in texts if len(text) > 1]):
        if not all(rests):  # one text is the beginning of another
            start, rests = start[:-1], [start[-1:] + rest for rest in rests]
        if not start:
            continue
        names = [(*rest, *spec.suffix_ids) for rest in rests]
        tokens = np.full((len(names), max(map(len, names))), -1, dtype=np.int64)
        for line, ids in zip(tokens, names, strict=True):
            line[: len(ids)] = ids
        context = np.asarray(table[list(start)], dtype=np.float32)[None]
        asked: dict[str, Array] = {"contexts": context, "tokens": tokens}
        known = expected[indices]
        if PROMPT in service.offers:
            wanted = {"features": Tensor("FP32", (1, len(names), e))}
            answer = ask(Question(PROMPT, asked, wanted))
            difference = _difference(answer["features"][0], known)
            found[PROMPT] = _larger(found.get(PROMPT, 0.0), difference)
        if SCORE in service.offers and len(names) > 1:
            labels = np.arange(len(names), dtype=np.int64)
            wanted = {"losses": Tensor("FP64", (1,)), "correct": Tensor("INT64", (1,))}
            asked |= {"features": np.ascontiguousarray(known), "labels": labels}
            answer = ask(Question(SCORE, asked, wanted))
            logits = bundle.logit_scale * known.astype(np.float64) @ known.T.astype(np.float64)
            logits += bundle.logit_bias
            losses = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
            losses += logits.max(1) - np.diag(logits)
            difference = abs(float(answer["losses"][0]) - float(losses.mean()))
            found[SCORE] = _larger(found.get(SCORE, 0.0), difference)
    return found


def _text_of(spec: TextSpec, row: I64) -> tuple[int, ...]:
    """Return a padded sequence's ids without what frames it; a closing id may be the padding's."""
    n_closing = len(spec.suffix_ids)
    end = int(np.flatnonzero(np.append(spec.pad_id - 1, row) != spec.pad_id)[-1])
    while tuple(row[end - n_closing : end].tolist()) != spec.suffix_ids and end < len(row):
        end += 1
    return tuple(row[len(spec.prefix_ids) : end - n_closing].tolist())


def _larger(one: float, other: float) -> float:
    """Return the larger one; what is no number stays, as `max` would not have it."""
    return float(np.maximum(one, other))


def _difference(got: F32, expected: F32) -> float:
    return float(np.abs(got.astype(np.float64) - expected.astype(np.float64)).max())
