"""The only place where cost is counted: queries, text forwards and image forwards.

One query is one candidate evaluated on one batch. A method's own probes are queries as well; a
final report is free.
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
    """Class prompts encoded: P * C per call."""
    image_forwards: int = 0
    """Pictures encoded for this run; views count each, those found in the cache do not."""
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

    def commit(self, n_classes: int) -> None:
        """Charge what was reserved, once its answers are part of the state to be saved."""
        self.queries += self._reserved
        self.text_forwards += self._reserved * n_classes
        self._reserved = 0
