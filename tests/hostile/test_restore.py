"""Damaged states of every optimizer and of the sampler: refused in one line, or harmless."""

import copy
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.hostile.mutations import DAMAGES, MISSING, PLACE, VALUES, Array, damage, mutate
from tests.ztune.methods import test_ogn as mixtures
from tests.ztune.optim.test_optimizers import FACTORIES, evaluation, quadratic, stored
from ztune.budget import Budget
from ztune.errors import FormatError, ZtuneError
from ztune.io.tensors import read_tensors, write_tensors
from ztune.loop import Tuning
from ztune.methods.ogn import PromptMixture
from ztune.objective import BatchSampler
from ztune.run import RunFolder
from ztune.types import Evaluation, Optimizer, Proposal, State

# The same inputs in every run; others with ZTUNE_FUZZ set.
fuzz = settings(max_examples=300, database=None, derandomize="ZTUNE_FUZZ" not in os.environ)
HARMFUL = sorted(
    {"missing", "NaN", "infinity", "another axis", "shorter", "empty", "longer", "half"}
)
"""What no state can have, whatever the array."""


def mixture(seed: int) -> Optimizer:
    return mixtures.make(seed)


OPTIMIZERS: dict[str, Callable[[int], Optimizer]] = {
    name: FACTORIES[name]
    for name in (
        "spsa-gc",
        "rgf",
        "cma full",
        "cma separable",
        "sharpzo validating",
        "sharpzo sparse",
        "gauss-newton",
        "gauss-newton plain",
        "validated",
        "early stop",
    )
} | {"mixture": mixture}


def answer(optimizer: Optimizer, proposal: Proposal) -> Evaluation:
    if isinstance(optimizer, PromptMixture):
        return mixtures.evaluation(mixtures.answered(proposal.points))
    with np.errstate(all="ignore"):
        return evaluation(proposal, np.nan_to_num(quadratic(proposal.points)))


def play(optimizer: Optimizer, n: int) -> None:
    for _ in range(n):
        optimizer.tell(answer(optimizer, optimizer.ask()))


@functools.cache
def saved(name: str) -> tuple[State, ...]:
    """Return states after 0, 1, 2, 5 and 9 rounds."""
    optimizer, states, done = OPTIMIZERS[name](1), [], 0
    for n in (0, 1, 2, 5, 9):
        play(optimizer, n - done)
        states.append(stored(copy.deepcopy(optimizer.state())))
        done = n
    return tuple(states)


def refused(optimizer: Optimizer | BatchSampler, state: State) -> bool:
    """Return whether a state is refused, which takes one line; fail for any other exception."""
    said = failure(lambda: optimizer.restore(state))
    return said is not None


def failure(act: Callable[[], object]) -> str | None:
    """Return the message of a ZtuneError in one line, or None; other exceptions fail the test."""
    try:
        act()
    except ZtuneError as error:
        said = str(error)
    else:
        return None
    assert said
    assert "\n" not in said
    return said


def bytes_of(arrays: Mapping[str, Array]) -> dict[str, object]:
    return {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}


def each() -> Iterator[str]:
    """Yield the optimizers, whose states are all damaged by the same drawn input."""
    for name in OPTIMIZERS:
        note(name)
        yield name


@fuzz
@given(st.integers(0, 4), st.sampled_from(sorted(DAMAGES)), PLACE)
def test_damaged_arrays(turn: int, kind: str, place: int) -> None:
    for name in each():
        arrays, values = saved(name)[turn]
        changed = damage(arrays, kind, place)
        same = bytes_of(changed) == bytes_of(arrays)
        optimizer = OPTIMIZERS[name](2)
        is_refused = refused(optimizer, (changed, values))
        assert same <= (not is_refused)
        if not is_refused:
            with np.errstate(all="ignore"):
                # The number of images shows with the next answer.
                is_refused = failure(functools.partial(play, optimizer, 2)) is not None
        if kind in HARMFUL:
            assert same or is_refused


@fuzz
@given(st.integers(0, 4), PLACE, VALUES)
def test_damaged_values(turn: int, place: int, value: Any) -> None:
    for name in each():
        arrays, values = saved(name)[turn]
        changed = mutate(dict(values), place, value)
        optimizer = OPTIMIZERS[name](2)
        if refused(optimizer, (arrays, changed)):
            assert json.dumps(changed) != json.dumps(values)
        else:
            assert value != MISSING
            with np.errstate(all="ignore"):
                play(optimizer, 2)


def sampler(size: int, seed: int = 0) -> BatchSampler:
    return BatchSampler(7, size, 2, np.random.default_rng(seed))


@pytest.mark.parametrize("size", [3, 7])
@fuzz
@given(st.integers(0, 3), st.sampled_from(sorted(DAMAGES)), PLACE, VALUES, st.booleans())
def test_a_damaged_sampler(
    size: int, drawn: int, kind: str, place: int, value: Any, of_values: bool
) -> None:
    whole = sampler(size)
    for _ in range(drawn):
        whole.next()
    before, values = stored(whole.state())
    arrays = before if of_values else damage(before, kind, place)
    restored = sampler(size, 1)
    if refused(restored, (arrays, mutate(dict(values), place, value) if of_values else values)):
        return
    assert of_values or kind not in HARMFUL or bytes_of(arrays) == bytes_of(before)
    for _ in range(4):
        batch = restored.next()
        assert len(batch.images) == size
        assert 0 <= batch.images.min() <= batch.images.max() < 7
        assert 0 <= batch.views.min() <= batch.views.max() < 2


def tuning() -> Tuning:
    return Tuning(FACTORIES["spsa-gc"](1), sampler(3), Budget(100), 0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run with 4 steps and a saved state."""
    folder, now = RunFolder(tmp_path_factory.mktemp("run")), tuning()
    for _ in range(4):
        proposal = now.optimizer.ask()
        now.sampler.next()
        found = evaluation(proposal, quadratic(proposal.points))
        now.budget.reserve(len(found.losses))
        now.optimizer.tell(found)
        now.budget.commit(1)
        now.step += 1
        folder.log(now, found)
    folder.save(now)
    with folder.history.open("a") as file:
        file.write('{"step": 5, "que')
    return folder


@pytest.fixture(scope="module")
def copied(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder(tmp_path_factory.mktemp("copied"))


HISTORIES: dict[str, Callable[[list[bytes]], bytes | None]] = {
    "missing": lambda lines: None,
    "empty": lambda lines: b"",
    "a line less": lambda lines: b"".join(lines[:3]),
    "cut": lambda lines: b"".join(lines)[:-5],
    "a line of another": lambda lines: b"".join([*lines[:3], lines[2]]),
    "no JSON": lambda lines: b"".join([*lines[:3], b"x" * (len(lines[3]) - 1) + b"\n"]),
    "a list": lambda lines: b"".join([lines[0], b"[]\n", *lines[1:]]),
    "not UTF-8": lambda lines: b"".join(lines).replace(b"loss", b"\xff\xfe\xff\xfe"),
    "a text": lambda lines: b"".join(lines).replace(b'"step": 2', b'"step":"2'),
    "NaN": lambda lines: b"".join(lines).replace(b'"step": 2', b'"step":NaN'),
    "no loss": lambda lines: b"".join(lines).replace(b'"loss"', b'"lost"'),
}


@pytest.mark.parametrize("kind", HISTORIES)
def test_a_state_without_its_history(kind: str, run: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.state.write_bytes(run.state.read_bytes())
    lines = run.history.read_bytes().splitlines(keepends=True)[:4]
    content = HISTORIES[kind](lines)
    if content is not None:
        folder.history.write_bytes(content)
    with pytest.raises(FormatError, match=r"history\.jsonl") as caught:
        folder.restore(tuning())
    assert str(caught.value).isprintable()
    assert folder.history.exists() == (content is not None)
    assert content is None or folder.history.read_bytes() == content


def test_a_whole_state_is_restored(run: RunFolder, tmp_path: Path) -> None:
    folder, now = RunFolder(tmp_path), tuning()
    folder.state.write_bytes(run.state.read_bytes())
    folder.history.write_bytes(run.history.read_bytes())
    folder.restore(now)
    assert (now.step, now.budget.queries) == (4, 40)
    assert len(folder.read_history()) == 4
    assert folder.history.read_bytes().endswith(b"}\n")  # a cut line is gone


def test_a_plugins_optimizer_that_checks_nothing(run: RunFolder, tmp_path: Path) -> None:
    folder, now = RunFolder(tmp_path), tuning()
    folder.state.write_bytes(run.state.read_bytes())

    class Careless:
        def restore(self, state: State) -> None:
            raise {"key": KeyError("x"), "value": ValueError("two\nlines")}[folder.path.suffix[1:]]

    now.optimizer = Careless()  # type: ignore[assignment]
    with pytest.raises(FormatError, match=r"cannot be restored \(KeyError") as caught:
        folder.restore(now)
    assert str(caught.value).isprintable()


@fuzz
@given(PLACE, VALUES)
def test_a_damaged_document_of_a_state(
    run: RunFolder, copied: RunFolder, place: int, value: Any
) -> None:
    arrays, document = read_tensors(run.state, "x")
    changed = mutate(document, place, value)
    copied.history.write_bytes(run.history.read_bytes())
    write_tensors(copied.state, arrays, changed)
    now = tuning()
    if failure(lambda: copied.restore(now)):
        assert json.dumps(changed) != json.dumps(document)
        return
    assert now.budget.queries == 40
    assert math.isfinite(now.seconds)
    assert len(copied.read_history()) == now.step == 4
    json.dumps(dict(now.optimizer.state()[1]), allow_nan=False)
