"""Cost accounting: queries, text forwards and image forwards.

One query is one candidate evaluated on one batch, a method's own probes included. The signal
check's probes are counted separately; a final report is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from ztune.errors import BudgetError


@dataclass
class Budget:
    """A limit on queries and the cost so far."""

    limit: int
    queries: int = 0
    text_forwards: int = 0
    """Class prompts encoded: P * C per call less those found on disk, signal check included."""
    text_forwards_cached: int = 0
    """Class prompts found on disk."""
    image_forwards: int = 0
    """Images encoded for this run, each view counted, cache hits excluded."""
    probe_queries: int = 0
    """Candidates evaluated by the signal check before the run, not charged to the budget."""
    sent: int = 0
    """Queries sent to a server, repeated ones included."""
    possibly_billed_twice: int = 0
    """Queries sent again without an answer: the server may have processed them twice."""
    report_queries: int = 0
    """Candidates evaluated by a server for reports, outside the steps."""
    _reserved: int = 0

    def fits(self, n_queries: int) -> bool:
        return self.queries + self._reserved + n_queries <= self.limit

    def reserve(self, n_queries: int) -> None:
        """Reserve `n_queries` before they are sent.

        Raises: BudgetError if they exceed the limit.
        """
        if not self.fits(n_queries):
            raise BudgetError(
                f"a step of {n_queries} queries does not fit: {self.queries} of {self.limit} spent"
            )
        self._reserved += n_queries

    def probe(self, n_queries: int, n_classes: int) -> None:
        """Count the signal check's candidates."""
        self.probe_queries += n_queries
        self.text_forwards += n_queries * n_classes

    @property
    def in_step(self) -> bool:
        """Whether reserved queries await their answers."""
        return self._reserved > 0

    def send(self, n_queries: int, *, again: bool) -> None:
        """Count queries sent to a server for the reserved step."""
        self.sent += n_queries
        self.possibly_billed_twice += n_queries if again else 0

    def report(self, n_queries: int) -> None:
        """Count queries sent to a server outside the steps."""
        self.report_queries += n_queries

    def commit(self, n_texts: int, n_images: int = 0, n_found: int = 0) -> None:
        """Charge the reserved queries once their answers are part of the state to save.

        Each query needed `n_texts` class prompts and encoded `n_images` images; `n_found` of all
        class prompts were on disk.
        """
        self.queries += self._reserved
        self.text_forwards += self._reserved * n_texts - n_found
        self.text_forwards_cached += n_found
        self.image_forwards += self._reserved * n_images
        self._reserved = 0
