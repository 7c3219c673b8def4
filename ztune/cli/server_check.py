"""What `ztune doctor` says of a server: what it offers, whether it is right, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from rich.table import Table

from ztune.cli.output import Output, table
from ztune.cli.server import connect_to, settings_from
from ztune.types import Json

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CONTEXT, _CANDIDATES = 8, 10


def check_server(
    url: str, values: Mapping[str, Json], output: Output
) -> tuple[dict[str, Json], list[str | Table]]:
    """Return what is known of a server once it has passed all checks, and the lines for a person.

    Raises: ServerError for the first check that it does not pass, ConfigError for settings.
    """
    from runtimes.served import Served
    from runtimes.tokenizer import Tokenizer
    from ztune.access import described

    connected = connect_to(url, values, output)
    service, bundle = connected.service, connected.bundle
    try:
        served = Served(service, bundle, losses=settings_from(values).losses)
        encoder = served.prompts(Tokenizer(bundle)).encoder(_WORDS, _CONTEXT, _CANDIDATES)
        seconds = None
        if "texts" in served.access:
            contexts = np.zeros((_CANDIDATES, _CONTEXT, bundle.text.width), dtype=np.float32)
            encoder.encode(contexts)
            times = []
            for _ in range(5):
                began = time.perf_counter()
                encoder.encode(contexts)
                times.append(time.perf_counter() - began)
            seconds = float(np.median(times)) / _CANDIDATES
        document: dict[str, Json] = {
            "url": str(service.location),
            "servers": service.n_servers,
            "models": [service.model(part) for part in service.offers],
            "gives": list[Json](sorted(served.access)),
            "bundle_digest": bundle.digest,
            "model_id": bundle.model_id,
            "precision": bundle.precision,
            "parity": dict(connected.parity),
            "tells_digest": all(offer.tells_digest for offer in service.offers.values()),
            "keeps_pictures": any(offer.keeps for offer in service.offers.values()),
            "shared_memory": service.shares_memory,
            "extensions": list[Json](sorted(service.extensions)),
            "seconds_per_query": seconds,
        }
    finally:
        service.close()
    said = "with every answer" if document["tells_digest"] else "not with every answer"
    rows = [
        ("models", ", ".join(service.model(part) for part in service.offers)),
        ("gives", described(served.access)),
        ("bundle", f"{bundle.digest[:12]}…, {bundle.precision}, told {said}"),
        ("pictures", "kept by the server" if document["keeps_pictures"] else "sent each time"),
        ("shared memory", "used" if document["shared_memory"] else "not used"),
    ]
    parity = [(part, f"{difference:.1e}") for part, difference in connected.parity.items()]
    lines: list[str | Table] = [
        "",
        table(f"server {service.location}", ("", ""), rows),
        "",
        table("largest difference from torch", ("model", "over the wire"), parity),
    ]
    if seconds is not None:
        what = f"{len(_WORDS)} classes, {_CONTEXT} context tokens, text side, with the wire"
        lines += ["", f"{seconds:.5f} s per query ({what})"]
    return document, lines
