"""The only place where cost is counted: queries, text forwards and image forwards.

One query is one candidate evaluated on one batch. A method's own probes are queries as well; what
the signal check evaluates before the run is counted beside them; a final report is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from ztune.errors import BudgetError


@dataclass
class Budget:
    """A limit on queries and what has been spent of it."""

    limit: int
    queries: int = 0
    text_forwards: int = 0
    """Class prompts encoded: P * C per call, of queries and of the check's probes."""
    image_forwards: int = 0
    """Images encoded for this run; views count each, those found in the cache do not."""
    probe_queries: int = 0
    """Candidates that the signal check evaluated before the run; the method's budget stays its."""
    sent: int = 0
    """Queries sent to a server, each time that they went: those charged, and those sent again."""
    possibly_billed_twice: int = 0
    """Queries sent again because no answer had come: the server may have done its work by then."""
    report_queries: int = 0
    """Candidates that a server evaluated for reports, outside every step."""
    _reserved: int = 0

    def fits(self, n_queries: int) -> bool:
        return self.queries + self._reserved + n_queries <= self.limit

    def reserve(self, n_queries: int) -> None:
        """Set `n_queries` aside before they are sent.

        Raises: BudgetError rather than overshoot.
        """
        if not self.fits(n_queries):
            raise BudgetError(
                f"a step of {n_queries} queries does not fit: {self.queries} of {self.limit} spent"
            )
        self._reserved += n_queries

    def probe(self, n_queries: int, n_classes: int) -> None:
        """Count what the signal check evaluated on the graph that tunes."""
        self.probe_queries += n_queries
        self.text_forwards += n_queries * n_classes

    @property
    def in_step(self) -> bool:
        """Whether queries are set aside whose answers are awaited."""
        return self._reserved > 0

    def send(self, n_queries: int, *, again: bool) -> None:
        """Count what goes to a server for the step that was reserved."""
        self.sent += n_queries
        self.possibly_billed_twice += n_queries if again else 0

    def report(self, n_queries: int) -> None:
        """Count what goes to a server and is no part of a step."""
        self.report_queries += n_queries

    def commit(self, n_texts: int, n_images: int = 0) -> None:
        """Charge what was reserved, once its answers are part of the state to be saved.

        A query of it encoded `n_texts` class prompts and `n_images` images.
        """
        self.queries += self._reserved
        self.text_forwards += self._reserved * n_texts
        self.image_forwards += self._reserved * n_images
        self._reserved = 0
