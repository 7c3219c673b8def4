"""Plans: every class once, pairs in one call, within the limit or an error."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtimes.plan import Sizes, make_plan
from ztune.errors import ConfigError

SIZES = Sizes(n_context=8, width=512, embed_dim=512, prefix=True)


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60),
    n_candidates=st.integers(1, 41),
    limit=st.integers(1, 400),
    prefix=st.booleans(),
)
def test_every_class_is_in_one_call_and_the_limit_holds(
    lengths: list[int], n_candidates: int, limit: int, prefix: bool
) -> None:
    sizes = Sizes(8, 512, 512, prefix)
    try:
        plan = make_plan(lengths, sizes, n_candidates, "cpu", limit)
    except ConfigError as error:
        found = re.search(r"expected at least (\d+) for these \d+ classes", str(error))
        assert found
        least = int(found[1])
        assert least > limit
        assert make_plan(lengths, sizes, n_candidates, "cpu", least).megabytes <= least
        return
    assert plan.megabytes <= limit
    assert sorted(np.concatenate(plan.groups).tolist()) == list(range(len(lengths)))
    assert plan.n_candidates % 2 == 0 or plan.n_candidates in (1, n_candidates)
    assert 1 <= plan.n_candidates <= max(n_candidates, 1)
    ordered = np.asarray(lengths)[np.concatenate(plan.groups)]
    assert (np.diff(ordered) >= 0).all()


def test_a_thousand_classes_and_ten_candidates_stay_below_300_mb() -> None:
    lengths = [3 + i % 5 for i in range(1000)]
    for provider, limit in (("cpu", None), ("cuda", 300)):
        plan = make_plan(lengths, SIZES, 10, provider, limit)
        assert plan.megabytes < 300
        assert plan.n_candidates >= 2
    assert make_plan(lengths, SIZES, 10, "cuda", None).groups[0].size == 1000


def test_few_classes_need_one_call() -> None:
    plan = make_plan([3] * 10, SIZES, 10, "cpu", None)
    assert plan.n_candidates == 10
    assert len(plan.groups) == 1
    assert plan.to_json() == {
        "candidates": 10,
        "class_groups": [10],
        "megabytes": round(plan.megabytes, 1),
    }


def test_a_candidate_batch_of_one_needs_one_call() -> None:
    assert make_plan([3] * 10, SIZES, 1, "cpu", None).n_candidates == 1
