"""What `ztune doctor` says of a server: what it offers, whether it is right, and how fast it is."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from ztune.cli.output import Output, table
from ztune.cli.server import connect_to, named_servers, settings_from
from ztune.types import Json


def check_server(
    url: str, values: Mapping[str, Json], output: Output
) -> tuple[dict[str, Json], list[str | Table]]:
    """Return what is known of a server once it has passed all checks, and the lines for a person.

    Raises: ServerError for the first check that it does not pass, ConfigError for settings.
    """
    from runtimes.remote.served import Served
    from runtimes.tokenizer import Tokenizer
    from ztune.access import TEXTS, described
    from ztune.pace import seconds_per_query

    connected = connect_to(url, values, named_servers(url, values), output)
    service, bundle = connected.service, connected.bundle
    try:
        served = Served(service, bundle, losses=settings_from(values).losses)
        seconds, what = None, ""
        if TEXTS in served.access:
            graph = served.prompts(Tokenizer(bundle))
            seconds, what = seconds_per_query(graph, bundle.text.width)
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
        lines += ["", f"{seconds:.5f} s per query ({what}, with the wire)"]
    return document, lines
