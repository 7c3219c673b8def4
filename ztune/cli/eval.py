"""`ztune eval`: accuracy of a run, a bundle or a packed classifier on labelled pictures."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from ztune.access import TEXTS
from ztune.cli.execution import add_execution_arguments, settled
from ztune.cli.output import Output, table
from ztune.cli.server import (
    add_server_arguments,
    is_url,
    merged,
    named_servers,
    open_served_workbench,
    place,
    require_no_server_options,
    server_settings,
)
from ztune.errors import ConfigError, DataError
from ztune.io.fields import Fields
from ztune.run_config import add_root_argument, place_of
from ztune.statistics import Score, score
from ztune.types import I64, Json

if TYPE_CHECKING:
    from ztune.artifact import Artifact
    from ztune.model import Workbench
    from ztune.run import RunFolder
    from ztune.run_config import Request

EXAMPLE = """\
  ztune eval runs/photos
  ztune eval bundles/vit-b-32 --data photos --split all --template "a photo of a {}."
  ztune eval triton://host:8001/vit-b-32 --data photos --split all
  ztune eval bundles/vit-b-32 --data other --split all --prompt runs/photos/prompt.safetensors
  ztune eval classifier.onnx --split-file runs/photos/split.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=place, metavar="RUN|BUNDLE|URL|classifier.onnx")
    parser.add_argument(
        "--data", metavar="FOLDER|NAME", help="labelled pictures, or their name with --root"
    )
    add_root_argument(parser)
    parser.add_argument("--split", choices=("test", "all"), help="which of them (default: test)")
    parser.add_argument("--split-file", type=Path, metavar="FILE", help="a run's split.json")
    parser.add_argument(
        "--bundle", type=place, metavar="DIR|URL", help="a run's bundle or server, where it moved"
    )
    parser.add_argument("--prompt", type=Path, metavar="FILE", help="a result of ztune tune")
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help='hand-written prompt, several are averaged (default: "a photo of a {}.")',
    )
    parser.add_argument(
        "--extractor", type=Path, metavar="FILE", help="ONNX file that a decoder was tuned with"
    )
    parser.add_argument(
        "--snapshots", action="store_true", help="also score the artifacts that a run left midway"
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names to choose among, one a line"
    )
    parser.add_argument("--names", type=Path, metavar="FILE", help="lines of folder<TAB>name")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep features here")
    parser.add_argument("--skip-broken", action="store_true", help="leave broken pictures out")
    add_execution_arguments(parser)
    add_server_arguments(parser)


@dataclass(frozen=True)
class Labelled:
    """Pictures to score: files with their SHA-256, class names, and what they are called."""

    items: list[tuple[Path, str]]
    labels: I64
    classes: tuple[str, ...]
    split: str

    def among(self, candidates: tuple[str, ...], whose: str) -> I64:
        """Return the labels as indices into other class names.

        Raises: DataError naming a class that is not among them.
        """
        index = {name: i for i, name in enumerate(candidates)}
        unknown = [name for name in self.classes if name not in index]
        if unknown:
            raise DataError(
                f'class "{unknown[0]}" of the pictures is not among {whose} '
                f"({', '.join(candidates[:5])}{', ...' if len(candidates) > 5 else ''}); "
                f"{len(unknown)} such class(es) in all"
            )
        return np.array([index[self.classes[label]] for label in self.labels], dtype=np.int64)

    def n_tuned_on(self, fingerprints: Iterable[int]) -> int:
        """Return how many of the pictures served tuning or validation."""
        known = {int(value) for value in fingerprints}
        return sum(int(digest[:16], 16) in known for _, digest in self.items)


def run(arguments: argparse.Namespace, output: Output) -> None:
    target = arguments.target
    if is_url(target) or (target.is_dir() and (target / "bundle.json").is_file()):
        _check_bundle_options(arguments)
        with _bench(arguments, target, output) as bench, ExitStack() as stack:
            _eval_bundle(arguments, bench, stack, output)
    elif (target / "run.json").is_file():
        _eval_run(arguments, output)
    elif target.is_file():
        _eval_classifier(arguments, output)
    else:
        state = "is no run (no run.json) and no bundle" if target.is_dir() else "does not exist"
        raise ConfigError(f'"{target}" {state}; eval takes a run, a bundle or a classifier.onnx')


def _eval_run(arguments: argparse.Namespace, output: Output) -> None:
    from ztune.run import RunFolder
    from ztune.run_config import request_from_json

    for name in ("data", "root", "split_file", "prompt", "classes", "names"):
        if getattr(arguments, name) is not None:
            raise ConfigError(
                f"a run brings its own pictures and prompt; leave out --{name.replace('_', '-')} "
                "(or evaluate its bundle)"
            )
    folder = RunFolder(arguments.target)
    head = folder.read()
    where = f'run "{folder.path}": run.json'
    if head.get("status") == "refused":
        raise ConfigError(
            f'run "{folder.path}" was refused before its first step, see "signal" in its run.json '
            "(start it anew with other settings)"
        )
    if head.get("status") != "finished":
        path = shlex.quote(str(folder.path))
        raise ConfigError(
            f'run "{folder.path}" is not finished (go on with: ztune tune --resume {path})'
        )
    request = request_from_json(Fields(head, where).object("request").values, where)
    pictures = _from_split_file(folder.split, arguments.split or "test")
    place_now = arguments.bundle or request.bundle
    if not is_url(place_now) and not Path(place_now).is_dir():
        raise ConfigError(
            f'the run\'s bundle "{place_now}" is gone; put it back, or name where it is now with '
            "--bundle DIR"
        )
    with _bench(arguments, place_now, output, request.server) as bench:
        _score_run(arguments, folder, request, pictures, bench, output)


def _score_run(
    arguments: argparse.Namespace,
    folder: RunFolder,
    request: Request,
    pictures: Labelled,
    bench: Workbench,
    output: Output,
) -> None:
    from ztune.artifact import read_artifact, require_same_model
    from ztune.evaluate import extractor_for, open_gallery
    from ztune.report import draw_confusion

    artifact = read_artifact(folder.prompt)
    require_same_model(artifact, bench.bundle.model_id, folder.prompt, bench.bundle.path)
    labels = pictures.among(artifact.classes, "the run's classes")
    extractor = extractor_for(artifact, arguments.extractor, request.extractor)
    gallery = open_gallery(
        bench,
        pictures.items,
        arguments.cache or request.cache_folder(folder.path),
        what="test pictures",
        skip_broken=arguments.skip_broken or request.skip_broken,
        extractor=extractor,
    )
    kept = gallery.plain.kept
    labels = labels[kept]
    templates = tuple(arguments.template or request.templates)
    zero_shot = bench.zero_shot(templates, artifact.classes)

    def scored(result: Artifact) -> Score:
        return score(gallery.logits(bench.refreshed(result)), labels, result.classes)

    before = score(zero_shot.logits(gallery.plain.values[0]), labels, artifact.classes)
    scores = {"zero-shot": before, "tuned": scored(artifact)}
    try:
        draw_confusion(scores, folder.path / "confusion.png")
    except OSError as error:
        output.warn(f"confusion.png is not drawn: {error.strerror}")
    document = _document(scores["tuned"], pictures, kept, artifact.tuning_pictures)
    if arguments.snapshots:
        seconds = {int(line["queries"]): line["seconds"] for line in folder.read_history()}
        curve: list[Json] = []
        for file in sorted(folder.snapshots.glob("*.safetensors")):
            snapshot = read_artifact(file)
            n = snapshot.provenance.queries
            accuracy = scored(snapshot).accuracy
            curve.append({"queries": n, "seconds": seconds.get(n), "accuracy": accuracy})
        document["curve"] = curve
    document |= {
        "zero_shot_accuracy": before.accuracy,
        "zero_shot_interval": list(before.interval),
        "templates": list(templates),
        "method": artifact.provenance.method,
        "run": str(folder.path),
    }
    _finish(document, scores, output)


def _bench(
    arguments: argparse.Namespace,
    target: Path | str,
    output: Output,
    saved: Mapping[str, Json] | None = None,
) -> Workbench:
    """Return a bundle or a server's at work; `saved` is how a run reached its server.

    Raises: ConfigError for an option that does not go with it.
    """
    from ztune.model import open_workbench

    if is_url(target):
        given = server_settings(arguments)
        settings = merged(saved or {}, given)
        named = named_servers(arguments.bundle or arguments.target, given)
        provider, threads = arguments.provider, arguments.threads
        if settings.get("images") != "local" and (provider, threads) != ("auto", None):
            raise ConfigError(
                "how graphs run is the server's affair: leave out --provider and --threads"
            )
        bench = open_served_workbench(
            str(target), settings, named, output, provider=provider, threads=threads
        )
        if TEXTS in bench.runtime.withheld:
            bench.close()
            raise ConfigError(
                f"{target} gives losses alone, no text features to score pictures by (use the "
                "bundle itself: ztune eval RUN --bundle DIR, or ztune eval BUNDLE --prompt FILE)"
            )
        return bench
    require_no_server_options(arguments)
    execution = settled(arguments.provider, arguments.threads, output)
    return open_workbench(Path(target), execution, output)


def _check_bundle_options(arguments: argparse.Namespace) -> None:
    """Refuse what does not go with a bundle.

    Raises: ConfigError.
    """
    if arguments.prompt is not None and arguments.template is not None:
        raise ConfigError("give --prompt or --template, not both")
    if arguments.bundle is not None:
        raise ConfigError("--bundle goes with a run; here the bundle is already named")
    if arguments.snapshots:
        raise ConfigError("--snapshots goes with a run")


def _eval_bundle(
    arguments: argparse.Namespace, bench: Workbench, stack: ExitStack, output: Output
) -> None:
    from ztune.artifact import HeadArtifact, read_artifact, require_same_model
    from ztune.data.manifests import read_class_list
    from ztune.evaluate import extractor_for, open_gallery

    pictures = _pictures(arguments, output)
    candidates, whose = pictures.classes, "the pictures' own"
    if arguments.classes is not None:
        candidates, whose = read_class_list(arguments.classes), f"of {arguments.classes}"
    fingerprints: Iterable[int] = ()
    artifact = None
    templates = tuple(arguments.template or ("a photo of a {}.",))
    if arguments.prompt is not None:
        artifact = read_artifact(arguments.prompt)
        require_same_model(artifact, bench.bundle.model_id, arguments.prompt, bench.bundle.path)
        known = set(pictures.classes) <= set(artifact.classes)
        if arguments.classes is None and (known or isinstance(artifact, HeadArtifact)):
            candidates, whose = artifact.classes, "those it was tuned on"
        artifact = bench.refreshed(artifact, candidates)
        candidates, fingerprints = artifact.classes, artifact.tuning_pictures.tolist()
        name = f"prompt {arguments.prompt.name}"
    else:
        name = f'template "{templates[0]}"' if len(templates) == 1 else "mean of the templates"
    extractor = extractor_for(artifact, arguments.extractor, None)
    output.remark(f"choosing among {len(candidates)} classes ({whose})")
    labels = pictures.among(candidates, "the class names to choose among")
    cache = arguments.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    gallery = open_gallery(
        bench,
        pictures.items,
        cache,
        what="pictures",
        skip_broken=arguments.skip_broken,
        extractor=extractor,
    )
    if artifact is not None:
        logits = gallery.logits(artifact)
    else:
        classifier = bench.zero_shot(templates, candidates)
        logits = classifier.logits(gallery.plain.values[0])
    kept = gallery.plain.kept
    result = score(logits, labels[kept], candidates)
    document = _document(result, pictures, kept, fingerprints)
    _finish(document, {name: result}, output)


def _eval_classifier(arguments: argparse.Namespace, output: Output) -> None:
    from runtimes.classifier import open_classifier
    from ztune.cli.predict import classify

    for name in ("prompt", "template", "classes", "cache", "bundle", "extractor", "snapshots"):
        if getattr(arguments, name) not in (None, False):
            raise ConfigError(f"a classifier is complete in itself; leave out --{name}")
    classifier = open_classifier(
        arguments.target, settled(arguments.provider, arguments.threads, output)
    )
    pictures = _pictures(arguments, output)
    labels = pictures.among(classifier.classes, "the classifier's classes")
    paths = [path for path, _ in pictures.items]
    logits, _, kept = classify(classifier, paths, output, arguments.skip_broken)
    result = score(logits, labels[kept], classifier.classes)
    document = _document(result, pictures, kept, classifier.tuning_pictures)
    _finish(document, {arguments.target.name: result}, output)


def _pictures(arguments: argparse.Namespace, output: Output) -> Labelled:
    """Return the pictures that --data or --split-file name."""
    if (arguments.data is None) == (arguments.split_file is None):
        raise ConfigError("eval needs either --data FOLDER or --split-file RUN/split.json")
    split = arguments.split or "test"
    if arguments.split_file is not None:
        if arguments.names is not None:
            raise ConfigError("a split file brings its own class names; leave out --names")
        if arguments.root is not None:
            raise ConfigError("a split file knows where its pictures are; leave out --root")
        return _from_split_file(arguments.split_file, split, pipe=True)
    from ztune.data.sources import read_source
    from ztune.data.split import digest_pictures

    place = place_of(arguments.data, arguments.root)
    dataset = read_source(place, arguments.root, arguments.names, tuned=False)
    for note in dataset.notes:
        output.remark(note)
    if split == "test":
        chosen = tuple(p for p in dataset.pictures if p.split == "test")
        if not chosen:
            raise DataError(
                f'data "{arguments.data}" has no test pictures of its own (use --split all, or '
                "--split-file RUN/split.json for those that a run kept)"
            )
        dataset = replace(dataset, pictures=chosen)
    digests = digest_pictures(dataset)
    items = [(dataset.root / p.path, d) for p, d in zip(dataset.pictures, digests, strict=True)]
    labels = np.array([p.label for p in dataset.pictures], dtype=np.int64)
    return Labelled(items, labels, dataset.classes, split)


def _from_split_file(path: Path, split: str, *, pipe: bool = False) -> Labelled:
    from ztune.data.split import Split
    from ztune.io.files import read_json

    where = f'split file "{path}"'
    whole = Split.from_json(read_json(path, where, pipe=pipe), where)
    if split == "test":
        whole = replace(whole, entries=whole.entries_of("test"))
        if not whole.entries:
            raise DataError(
                f"{where} has no test pictures (tune with --test-data or more pictures, or "
                "evaluate the bundle on other --data)"
            )
    whole.check_unchanged()
    items = [(whole.file(entry), entry.sha256) for entry in whole.entries]
    labels = np.array([entry.label for entry in whole.entries], dtype=np.int64)
    return Labelled(items, labels, whole.classes, split)


def _document(
    result: Score, pictures: Labelled, kept: np.ndarray, fingerprints: Iterable[int]
) -> dict[str, Json]:
    return {
        "accuracy": result.accuracy,
        "interval": list(result.interval),
        "n": result.n,
        "candidates": len(result.classes),
        "split": pictures.split,
        "per_class": result.per_class(),
        "broken_pictures": int((~kept).sum()),
        "tuning_pictures": pictures.n_tuned_on(fingerprints),
    }


def _finish(document: dict[str, Json], scores: Mapping[str, Score], output: Output) -> None:
    if document["tuning_pictures"]:
        output.warn(
            f"{document['tuning_pictures']} of these {document['n']} pictures served tuning or "
            "validation: this is no test figure"
        )
    rows = [
        (name, f"{s.accuracy:.1%}", f"{s.interval[0]:.1%} to {s.interval[1]:.1%}")
        for name, s in scores.items()
    ]
    title = f"accuracy on {document['n']} pictures ({document['split']})"
    lines: list[str | Table] = [table(title, ("", "accuracy", "95 % interval"), rows)]
    own = {name: Fields(s.per_class(), "per_class") for name, s in scores.items()}
    classes = list(next(iter(own.values())).values)
    per_class = []
    for name in classes:
        parts = [own[which].object(name) for which in own]
        per_class.append(
            (name, str(parts[0].integer("n")), *(f"{p.number('accuracy'):.1%}" for p in parts))
        )
    lines += ["", table("", ("class", "pictures", *scores), per_class)]
    output.result(document, lines)
