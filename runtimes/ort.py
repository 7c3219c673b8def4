"""Run a bundle's forward passes in local ONNX Runtime: numpy in, numpy out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from runtimes.binding import BoundCall
from runtimes.bundle import PARITY, Bundle, ImageSpec, Parity
from runtimes.capture import capture, symbolic_sizes
from runtimes.plan import Plan, Sizes, make_plan, obstacle_to_capture
from runtimes.preprocess import PREPROCESS_VERSION, normalise, read_view
from runtimes.prompts import (
    encode_template,
    feeds,
    name_lengths,
    name_tokens,
    token_table,
)
from runtimes.providers import (
    Execution,
    Setup,
    check_precision,
    onnxruntime,
    open_session,
    require_placement,
    run_graph,
)
from runtimes.tokenizer import Tokenizer
from runtimes.weights import WEIGHTS
from ztune.errors import FormatError
from ztune.io.tensors import read_tensors
from ztune.types import F32, I64, U8, PromptEncoder, RandomView


class Graph:
    """An open graph of a bundle, with checked precision and placement."""

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        execution: Execution,
        calls: Sequence[Mapping[str, np.ndarray]] = (),
    ):
        """Open a graph; `calls` are inputs of all shapes to come, for TensorRT."""
        check_precision(bundle.precision, execution.provider)
        self.path = bundle.file(f"{name}.onnx")
        setup = Setup()
        if execution.provider == "tensorrt":
            setup = Setup(calls=tuple({k: v.shape for k, v in call.items()} for call in calls))
        # On a device one profiled run proves that the graph runs there.
        if execution.provider != "cpu":
            given = calls[0] if calls else parity_inputs(bundle.file(PARITY), name)[0]
            require_placement(self.path, execution, given, setup)
        self.session = open_session(self.path, execution, setup)


def encoder_identity(weights: str, image: ImageSpec, execution: Execution, *more: str) -> str:
    """Return everything that affects a feature (see ImageEncoder); `weights` is a digest."""
    parts = [
        weights,
        repr(image),
        execution.provider,
        *more,
        f"onnxruntime {onnxruntime().__version__}",
        f"preprocess {PREPROCESS_VERSION}",
        f"pillow {PIL.__version__}",
    ]
    return "|".join(parts)


class OrtImageEncoder:
    """The image tower (an ImageEncoder), opened when the first image is encoded."""

    def __init__(self, bundle: Bundle, execution: Execution):
        self._bundle = bundle
        self._execution = execution
        self._graph: Graph | None = None
        weights = "".join(
            bundle.files[name].sha256
            for name in ("image.onnx", "image.onnx.data", WEIGHTS)
            if name in bundle.files
        )
        self._identity = encoder_identity(weights, bundle.image, execution, bundle.precision)

    @property
    def identity(self) -> str:
        return self._identity

    def read(self, path: Path, view: RandomView | None) -> U8:
        return read_view(path, self._bundle.image, view)

    def encode(self, pixels: U8) -> F32:
        ready = normalise(pixels, self._bundle.image)
        if self._graph is None:
            calls = [{"pixels": ready}, {"pixels": ready[:1]}]
            self._graph = Graph(self._bundle, "image", self._execution, calls)
        # Dynamic int8 scales activations over the whole call, so features would depend on the
        # batch: encode images one at a time.
        batches = [one[None] for one in ready] if self._bundle.precision == "int8" else [ready]
        run = functools.partial(run_graph, self._graph.session, self._graph.path, ["features"])
        return np.concatenate([run({"pixels": batch})[0] for batch in batches])


Wrap = Callable[["OrtPromptEncoder"], PromptEncoder]


class OrtPromptGraph:
    """The prompt graph of a bundle: one session for all encoders, opened on use on a CPU."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer, execution: Execution):
        self.bundle = bundle
        self._tokenizer = tokenizer
        self._execution = execution
        check_precision(bundle.precision, execution.provider)
        self._open = functools.cache(lambda: Graph(bundle, "prompt", execution))
        if execution.provider == "cuda":  # whose errors come before anything is encoded
            self._open()

    def encoder(
        self, classes: Sequence[str], n_context: int, n_candidates: int
    ) -> OrtPromptEncoder:
        """Return the encoder of contexts of `n_context` tokens before fixed class names.

        Raises: DataError when a name is too long for the tower or two names have the same tokens,
            ConfigError when the memory limit is too small.
        """
        names = name_tokens(self.bundle.text, self._tokenizer, classes, n_context)
        return self._encoder(names, n_context, n_candidates)

    def encode_template(
        self, template: str, classes: Sequence[str], wrap: Wrap = lambda encoder: encoder
    ) -> F32:
        """Return the unit features f32[C, e] of a template filled with the class names.

        `wrap` takes each encoder that is used, and returns the one to use.

        Raises: ConfigError for the template, DataError for a name.
        """
        return encode_template(
            self.bundle,
            self._tokenizer,
            template,
            classes,
            lambda names, n_context: wrap(self._encoder(names, n_context, 1)),
        )

    def _encoder(
        self, names: Sequence[tuple[int, ...]], n_context: int, n_candidates: int
    ) -> OrtPromptEncoder:
        bundle, execution = self.bundle, self._execution
        plan = plan_for(bundle, names, n_context, n_candidates, execution)
        table = token_table(bundle)
        groups = [
            (group, feeds(bundle.text, table, [names[index] for index in group], n_context))
            for group in plan.groups
        ]
        opened = self._open
        # TensorRT must know the shapes of its calls, so each encoder opens its own graph.
        if execution.provider == "tensorrt":
            width = bundle.text.width
            at_once = dict.fromkeys((plan.n_candidates, n_candidates % plan.n_candidates or 1, 1))
            calls = [
                {"contexts": np.zeros((n, n_context, width), dtype=np.float32), **constants}
                for n in at_once
                for _, constants in groups
            ]
            opened = functools.cache(lambda: Graph(bundle, "prompt", execution, calls))
            opened()
        texts = Texts(bundle, tuple(names), n_context)
        return OrtPromptEncoder(plan, groups, opened, texts, execution, n_candidates)


@dataclass(frozen=True)
class Texts:
    """The class names of an encoder, as ids, and the length of its contexts."""

    bundle: Bundle
    names: tuple[tuple[int, ...], ...]
    n_context: int


class OrtPromptEncoder:
    """The prompt graph for fixed class names (a TextEncoder)."""

    cuda_graph: str | None
    """"captured", or "not captured: " and the reason; None on a CPU."""

    def __init__(
        self,
        plan: Plan,
        groups: Sequence[tuple[I64, Mapping[str, np.ndarray]]],
        opened: Callable[[], Graph],
        texts: Texts,
        execution: Execution,
        n_candidates: int,
    ):
        """Take a plan for candidate batches of `n_candidates`, its groups' inputs, and a graph.

        `opened` opens the graph once, when a text is encoded.
        """
        self.plan = plan
        self._groups = groups
        self._opened = opened
        self._texts = texts
        self.embed_dim = texts.bundle.embed_dim
        self._precision = texts.bundle.precision
        self._n_candidates = n_candidates
        self._execution = execution
        self._calls: dict[tuple[int, tuple[int, ...]], BoundCall] = {}
        reason = obstacle_to_capture(plan, n_candidates, execution)
        self._to_capture = reason is None
        self.cuda_graph = f"not captured: {reason or 'fewer than two candidate batches ran'}"
        if execution.provider == "cpu":
            self.cuda_graph = None

    def encode(self, contexts: F32) -> F32:
        n_classes = 1 + max(int(group.max()) for group, _ in self._groups)
        features = np.empty((len(contexts), n_classes, self.embed_dim), dtype=np.float32)
        step = self.plan.n_candidates
        for first in range(0, len(contexts), step):
            part = contexts[first : first + step]
            for number, (group, _) in enumerate(self._groups):
                call = self._call(number, part)
                features[first : first + step, group] = call({"contexts": part})
        return features

    @property
    def class_keys(self) -> tuple[str, ...]:
        """What a feature depends on, for each class, besides the context and the bundle.

        That is the name, the length to which its group is padded, and whether the group has other
        names. In low precision and on other devices it is the whole call: all names and contexts,
        and how many of them are encoded together (`whole_calls`).
        """
        keys = [""] * len(self._texts.names)
        for group in self.plan.groups:
            names, width = self._names_of(group)
            where = f"{width}, alone" if len(names) == 1 else f"{width}"
            for index, name in zip(group, names, strict=True):
                keys[index] = f"{name} in {where}"
        if self.whole_calls:
            groups = [group.tolist() for group in self.plan.groups]
            call = f"{keys} in groups {groups}, {self.plan.n_candidates} contexts at once"
            keys = [f"{index} of {call}" for index in range(len(keys))]
        return tuple(keys)

    @property
    def whole_calls(self) -> bool:
        """Whether the bytes of a feature depend on all of its call."""
        return self._precision != "fp32" or self._execution.provider != "cpu"

    def _names_of(self, group: I64) -> tuple[list[tuple[int, ...]], int]:
        """Return a group's names and the length that they are padded to."""
        names = [self._texts.names[index] for index in group]
        return names, max(name_lengths(self._texts.bundle.text, names))

    def part(self, classes: I64) -> OrtPromptEncoder:
        """Return the encoder of some classes i64[k], with the bytes that they have here."""
        texts, groups = self._texts, []
        table = token_table(texts.bundle)
        for group in self.plan.groups:
            at = np.flatnonzero(np.isin(classes, group))
            if len(at) == 1 < len(group):
                at = np.repeat(at, 2)  # a single name is multiplied by other kernels
            if len(at):
                names = [texts.names[index] for index in classes[at]]
                width = self._names_of(group)[1]
                groups.append((at, feeds(texts.bundle.text, table, names, texts.n_context, width)))
        return OrtPromptEncoder(
            self.plan, groups, self._opened, texts, self._execution, self._n_candidates
        )

    def encode_on_device(self, contexts: F32) -> Iterator[list[Any]]:
        """Yield features f32[p, C_g, e] by group, one call's candidates at a time.

        They are OrtValues on the graph's device, valid until the next iteration.
        """
        step = self.plan.n_candidates
        for first in range(0, len(contexts), step):
            part = contexts[first : first + step]
            yield [
                self._call(number, part).run({"contexts": part})
                for number in range(len(self._groups))
            ]

    def _call(self, number: int, contexts: F32) -> BoundCall:
        """Return the call of one group and number of candidates, bound once."""
        key = (number, contexts.shape)
        if key not in self._calls:
            self._calls[key] = self._bind(self._opened().session, number, contexts.shape)
        elif self._to_capture and len(contexts) == self.plan.n_candidates:
            # Only on the second such call: a single call does not justify another session.
            self._to_capture = False
            ordinary = self._calls[key]
            expected = ordinary({"contexts": contexts})
            captured, self.cuda_graph = capture(
                functools.partial(self._bind_captured, contexts.shape),
                contexts,
                expected,
                self._precision,
            )
            self._calls[key] = captured or ordinary
        return self._calls[key]

    def _bind(self, session: Any, number: int, shape: tuple[int, ...]) -> BoundCall:
        group, constants = self._groups[number]
        features = (shape[0], len(group), self.embed_dim)
        path, provider = self._opened().path, self._execution.provider
        return BoundCall(session, path, provider, constants, {"contexts": shape}, features)

    def _bind_captured(self, shape: tuple[int, ...]) -> BoundCall:
        """Return the only call of a plan, in a session whose shapes are all fixed."""
        _, constants = self._groups[0]
        shapes = {"contexts": shape, **{name: array.shape for name, array in constants.items()}}
        sizes = symbolic_sizes(self._opened().session, shapes)
        session = open_session(self._opened().path, self._execution, Setup(capture_sizes=sizes))
        return self._bind(session, 0, shape)


def plan_for(
    bundle: Bundle,
    names: Sequence[tuple[int, ...]],
    n_context: int,
    n_candidates: int,
    execution: Execution,
) -> Plan:
    """Return how candidate batches of `n_candidates` with names of these ids are split into calls.

    Raises: ConfigError when the memory limit is too small.
    """
    sizes = Sizes(n_context, bundle.text.width, bundle.embed_dim, bundle.text.graph == "prefix")
    lengths = name_lengths(bundle.text, names)
    return make_plan(lengths, sizes, n_candidates, execution.provider, execution.memory_limit)


def allowed_difference(at_export: float) -> float:
    """Return the allowed difference from torch, given the difference at export.

    Machines differ in the order of sums; half as much again is allowed for that.
    """
    return max(1e-4, 1.5 * at_export)


def parity_inputs(path: Path, graph: str) -> tuple[dict[str, np.ndarray], F32]:
    """Return the inputs of one graph in a parity file, and torch's output for them.

    Raises: FormatError when the file is corrupted or has none for this graph.
    """
    arrays, _ = read_tensors(path, "parity figures")
    own = {
        name.partition(".")[2]: array
        for name, array in arrays.items()
        if name.partition(".")[0] == graph
    }
    features = own.pop("features", np.zeros(0))
    empty = any(array.size == 0 for array in (features, *own.values()))
    if not own or empty or features.dtype != np.float32 or features.ndim < 2:
        raise FormatError(f"{path} has no valid parity data for {graph}.onnx (export again)")
    return own, features


def row_parity(bundle: Bundle, graph: str) -> tuple[np.ndarray, F32]:
    """Return the rows that a bundle's image or text graph was compared on, and torch's features.

    They are pixels f32[n, 3, S, S] or tokens i64[n, length], and f32[n, e].

    Raises: FormatError for other names or shapes.
    """
    given, features = parity_inputs(bundle.file(PARITY), graph)
    size, n = bundle.image.size, len(features)
    name, dtype, shape = {
        "image": ("pixels", np.float32, (n, 3, size, size)),
        "text": ("tokens", np.int64, (n, bundle.text.context_length)),
    }[graph]
    rows = given.get(name, np.zeros(0))
    if (
        rows.dtype != dtype
        or rows.shape != shape
        or features.shape != (n, bundle.embed_dim)
        or (dtype == np.int64 and rows.min() < 0)
    ):
        raise FormatError(
            f'bundle "{bundle.path}": {PARITY} has {name} {rows.dtype}{list(rows.shape)} with '
            f"features {list(features.shape)}, expected {list(shape)} and "
            f"{[n, bundle.embed_dim]} (file damaged; export again)"
        )
    return rows, features


def parity_figures(
    parity: Path, name: str, graph: Path, execution: Execution, setup: Setup | None = None
) -> Parity:
    """Return the worst cosine and max_abs between a graph's features here and torch's."""
    given, expected = parity_inputs(parity, name)
    session = open_session(graph, execution, setup)
    parts = [given]
    if name == "image":
        # One at a time, as int8 encodes them: a batch shares its activations' scale.
        parts = [{"pixels": pixels[None]} for pixels in given.get("pixels", expected)]
    features = [run_graph(session, graph, ["features"], part)[0] for part in parts]
    got = np.concatenate(features).astype(np.float64)
    if got.shape != expected.shape:
        raise FormatError(
            f"{parity} has features {list(expected.shape)} of {name}.onnx, which returns "
            f"{list(got.shape)} (file damaged; export again)"
        )
    wide = expected.astype(np.float64)
    norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(wide, axis=-1)
    cosines = (got * wide).sum(axis=-1) / norms
    return Parity(cosine=float(cosines.min()), max_abs=float(np.abs(got - wide).max()))


def parity_on_this_machine(bundle: Bundle, graph: str, execution: Execution) -> Parity:
    """Return a graph's worst cosine and max_abs to torch on this machine.

    Raises: ProviderError when the provider cannot run the bundle's precision.
    """
    check_precision(bundle.precision, execution.provider)
    return parity_figures(bundle.file(PARITY), graph, bundle.file(f"{graph}.onnx"), execution)
