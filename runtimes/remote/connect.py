"""Connect to a server at the start of a run: check health, models, bundle and parity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.bundle import Bundle, TextSpec
from runtimes.ort import allowed_difference, row_parity
from runtimes.prompts import embed, group_by_prefix, token_table
from runtimes.remote.client_half import Progress, load_client_half
from runtimes.remote.contract import IMAGE, PROMPT, SCORE, TEXT, Tensor, check_offer
from runtimes.remote.endpoint import Connection, parse_location
from runtimes.remote.service import Infer, ModelRequest, Service
from runtimes.remote.transport import Array
from ztune.errors import ServerError
from ztune.types import F32, I64

Remark = Callable[[str], None]


@dataclass(frozen=True)
class CheckedService:
    """A checked service and the client half of its bundle."""

    service: Service
    bundle: Bundle
    parity: dict[str, float]
    """Largest difference from torch by model, measured over the network."""


def connect(
    url: str,
    connection: Connection,
    client: Path | None,
    remark: Remark,
    progress: Progress,
) -> CheckedService:
    """Connect to a server and check that it serves the bundle of the client half.

    Raises: ConfigError for addresses and settings, ServerError for errors of the server.
    """
    location = parse_location(url)
    service = Service(location, connection, remark)
    try:
        service.start()
        bundle = load_client_half(service, client, progress)
        for part, offer in service.offers.items():
            check_offer(part, offer, bundle, f'{location}: model "{service.model(part)}"')
        service.digest = bytes.fromhex(bundle.digest)
        parity = check_parity(service, bundle, lambda request: service.infer([request])[0])
        service.verify = lambda infer: check_parity(service, bundle, infer)
        silent = [service.model(p) for p, o in service.offers.items() if not o.reports_digest]
        if silent:
            remark(
                f"{', '.join(silent)} report no bundle digest: parity is checked instead, at "
                "the start and after a failed request"
            )
    except BaseException:
        service.close()
        raise
    return CheckedService(service, bundle, parity)


def check_parity(service: Service, bundle: Bundle, infer: Infer) -> dict[str, float]:
    """Request features that torch computed at export; return the largest differences by model.

    Raises: ServerError when one exceeds its limit.
    """
    found: dict[str, float] = {}
    given, expected = row_parity(bundle, IMAGE)
    if IMAGE in service.offers:
        found[IMAGE] = _largest_difference(infer, IMAGE, "pixels", given, expected)
    token_rows, expected = row_parity(bundle, TEXT)
    if TEXT in service.offers:
        found[TEXT] = _largest_difference(infer, TEXT, "tokens", token_rows, expected)
    found |= _check_prompts(service, bundle, infer, token_rows, expected)
    for part, difference in found.items():
        limit = allowed_difference(bundle.parity["prompt" if part == SCORE else part]["max_abs"])
        limit *= bundle.logit_scale if part == SCORE else 1
        if not difference <= limit:
            raise ServerError(
                f'{service.location}: model "{service.model(part)}" differs from torch by '
                f"{difference:.1e}, expected at most {limit:.1e} (it has other weights or computes "
                "wrong results)"
            )
    return found


def _largest_difference(infer: Infer, part: str, name: str, rows: Array, expected: F32) -> float:
    """Return the largest difference from features f32[N, e], one request per row."""
    worst = 0.0
    for row, features in zip(rows, expected, strict=True):
        wanted = {"features": Tensor("FP32", (1, len(features)))}
        answer = infer(ModelRequest(part, {name: row[None]}, wanted))
        worst = _nan_max(worst, _difference(answer["features"][0], features))
    return worst


def _check_prompts(
    service: Service, bundle: Bundle, infer: Infer, token_rows: I64, expected: F32
) -> dict[str, float]:
    """Request known texts, split into a context (their common start) and names (the rest)."""
    spec, found = bundle.text, dict[str, float]()
    texts = [_text_ids(spec, row) for row in token_rows]
    table, e = token_table(bundle), bundle.embed_dim
    for indices, start, rests in group_by_prefix([text for text in texts if len(text) > 1]):
        if not all(rests):  # one text is a prefix of another
            start, rests = start[:-1], [start[-1:] + rest for rest in rests]
        if not start:
            continue
        names = [(*rest, *spec.suffix_ids) for rest in rests]
        tokens = np.full((len(names), max(map(len, names))), -1, dtype=np.int64)
        for line, ids in zip(tokens, names, strict=True):
            line[: len(ids)] = ids
        context = embed(table, np.array(start, np.int64))[None]
        asked: dict[str, Array] = {"contexts": context, "tokens": tokens}
        known = expected[indices]
        if PROMPT in service.offers:
            wanted = {"features": Tensor("FP32", (1, len(names), e))}
            answer = infer(ModelRequest(PROMPT, asked, wanted))
            difference = _difference(answer["features"][0], known)
            found[PROMPT] = _nan_max(found.get(PROMPT, 0.0), difference)
        if SCORE in service.offers and len(names) > 1:
            labels = np.arange(len(names), dtype=np.int64)
            wanted = {"losses": Tensor("FP64", (1,)), "correct": Tensor("INT64", (1,))}
            asked |= {"features": np.ascontiguousarray(known), "labels": labels}
            answer = infer(ModelRequest(SCORE, asked, wanted))
            logits = bundle.logit_scale * known.astype(np.float64) @ known.T.astype(np.float64)
            logits += bundle.logit_bias
            losses = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
            losses += logits.max(1) - np.diag(logits)
            difference = abs(float(answer["losses"][0]) - float(losses.mean()))
            found[SCORE] = _nan_max(found.get(SCORE, 0.0), difference)
    return found


def _text_ids(spec: TextSpec, row: I64) -> tuple[int, ...]:
    """Return a padded sequence's ids without prefix, suffix and padding, which may share ids."""
    n_closing = len(spec.suffix_ids)
    end = int(np.flatnonzero(np.append(spec.pad_id - 1, row) != spec.pad_id)[-1])
    while tuple(row[end - n_closing : end].tolist()) != spec.suffix_ids and end < len(row):
        end += 1
    return tuple(row[len(spec.prefix_ids) : end - n_closing].tolist())


def _nan_max(one: float, other: float) -> float:
    """Return the larger one; NaN propagates, unlike with `max`."""
    return float(np.maximum(one, other))


def _difference(got: F32, expected: F32) -> float:
    return float(np.abs(got.astype(np.float64) - expected.astype(np.float64)).max())
