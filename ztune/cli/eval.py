"""`ztune eval`: accuracy of a run, a bundle or a packed classifier on labelled images."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.remote.endpoint import is_url, parse_named_server
from runtimes.remote.settings import merge_settings
from ztune.capabilities import TEXTS
from ztune.cli.options import add
from ztune.cli.output import Output, Table
from ztune.cli.server import (
    add_server_arguments,
    place,
    require_no_server_options,
    server_settings,
)
from ztune.errors import ConfigError
from ztune.io.kinds import kind_of, wrong_kind
from ztune.printing import first_few, quoted
from ztune.run_config import place_of
from ztune.statistics import Score, score
from ztune.types import Json

if TYPE_CHECKING:
    from ztune.evaluate import LabelledImages
    from ztune.inliers import Refusals
    from ztune.model import Model

USAGE = (
    "RUN [options]",
    "BUNDLE|URL --data FOLDER|NAME [options]",
    "classifier.onnx --data FOLDER|NAME [options]",
)
EXAMPLE = """\
  ztune eval runs/photos
  ztune eval bundles/vit-b-32 --data photos --split all --template "a photo of a {}."
  ztune eval triton://host:8001/vit-b-32 --data photos --split all
  ztune eval bundles/vit-b-32 --data other --split all --prompt runs/photos/prompt.safetensors
  ztune eval classifier.onnx --split-file runs/photos/split.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", type=place, metavar="RUN|BUNDLE|URL|classifier.onnx", help="what to evaluate"
    )
    add(
        parser,
        "--data",
        help="labelled images, or a name with --root; for a run: where its images moved",
    )
    add(parser, "--root")
    add(parser, "--test-data", help="for a run: where its test images moved")
    parser.add_argument("--split", choices=("test", "all"), help="images (default: test)")
    parser.add_argument("--split-file", type=Path, metavar="FILE", help="a run's split.json")
    parser.add_argument(
        "--bundle",
        type=place,
        metavar="DIR|URL",
        help="for a run: where its bundle or server moved",
    )
    parser.add_argument("--prompt", type=Path, metavar="RUN|FILE", help="run or prompt")
    add(parser, "--template")
    parser.add_argument("--foreign", type=Path, metavar="FOLDER", help="images of no class")
    parser.add_argument("--snapshots", action="store_true", help="also evaluate a run's snapshots")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line")
    add(parser, "--names", "--nested", "--cache", "--skip-broken", "--max-pixels", "--provider")
    add(parser, "--threads")
    add_server_arguments(parser)


def run(arguments: argparse.Namespace, output: Output) -> None:
    target = arguments.target
    if is_url(target) or (target.is_dir() and (target / "bundle.json").is_file()):
        _check_bundle_options(arguments)
        with _model(arguments, target, output) as model:
            _eval_bundle(arguments, model, output)
    elif (target / "run.json").is_file():
        _eval_run(arguments, output)
    elif target.is_file() and kind_of(target) != "artifact":
        _eval_classifier(arguments, output)
    else:
        raise wrong_kind(target, "scored")


def _eval_run(arguments: argparse.Namespace, output: Output) -> None:
    from ztune.evaluate import (
        NoTestImagesError,
        document_without_test,
        labelled_of_split,
        score_run,
    )
    from ztune.foreign import read_foreign, refusals_of, refusals_of_run
    from ztune.report import draw_confusion, draw_reliability
    from ztune.run import RunFolder
    from ztune.run_document import run_report

    for name in ("root", "split_file", "prompt", "classes", "names", "nested"):
        if name in arguments.given:
            raise ConfigError(
                f"{arguments.given[name]} does not apply to a run, which has its own images and "
                "prompt (leave it out, or evaluate the bundle)"
            )
    folder = RunFolder(arguments.target)
    head = folder.read()
    if head.get("status") == "refused":
        raise ConfigError(
            f'run "{folder.path}" was refused before its first step, see "signal" in its run.json '
            "(start it again with other settings)"
        )
    if head.get("status") != "finished":
        raise ConfigError(
            f'run "{folder.path}" is not finished (resume with: ztune tune --resume '
            f"{quoted(folder.path)})"
        )
    folder.remove_leftovers()
    report = run_report(head, f'run "{folder.path}": run.json')
    run_config, part = report.run_config, arguments.split or "test"
    moved = {"data": arguments.data, "test_data": arguments.test_data}
    foreign = read_foreign(arguments.foreign, run_config.reject, output)
    try:
        images, tested = labelled_of_split(folder.split, part, **moved), True
    except NoTestImagesError:
        if foreign is None:
            document, line = document_without_test(folder, report)
            output.result(document, [line])
            return
        images, tested = labelled_of_split(folder.split, "train", **moved), False
    place_now = arguments.bundle or run_config.bundle
    if not is_url(place_now) and not Path(place_now).is_dir():
        raise ConfigError(
            f'the run\'s bundle "{place_now}" does not exist (give its new path with --bundle DIR)'
        )
    templates = tuple(arguments.templates or run_config.templates)
    with _model(arguments, place_now, output, run_config.server) as model:
        if not tested:
            assert foreign is not None
            cached = {"cache": arguments.cache, "skip_broken": arguments.skip_broken}
            seen = refusals_of_run(folder, run_config, images, model, foreign, **cached)
            document, line = document_without_test(folder, report, seen)
            output.result(document, [line, *_refusal_lines(seen)])
            return
        found = score_run(
            folder,
            run_config,
            images,
            model,
            templates=templates,
            cache=arguments.cache,
            skip_broken=arguments.skip_broken,
            snapshots=arguments.snapshots,
        )
        refusals = refusals_of(found.artifact, images, found.features, foreign)
    for draw, name in ((draw_confusion, "confusion.png"), (draw_reliability, "reliability.png")):
        try:
            draw(found.scores, folder.path / name)
        except OSError as error:
            output.warn(f"cannot write {name}: {error.strerror}")
    document = images.document(found.tuned, found.kept, found.artifact, refusals)
    if found.curve is not None:
        document["curve"] = found.curve
    document |= {
        "zero_shot_accuracy": found.zero_shot.accuracy,
        "zero_shot_interval": list(found.zero_shot.interval),
        "templates": list(templates),
        "classes_without_images": list(found.tuned.without_images),
        "method": found.artifact.provenance.method,
        "run": str(folder.path),
    }
    if missing := found.tuned.without_images:
        output.warn(f"classes without images here: {first_few(missing)}")
    _finish(document, found.scores, refusals, output)


def _model(
    arguments: argparse.Namespace,
    target: Path | str,
    output: Output,
    saved: Mapping[str, Json] | None = None,
) -> Model:
    """Open a bundle or server; `saved` are the run's server settings.

    Raises: ConfigError for an option that does not go with it.
    """
    from runtimes.providers import resolve_execution
    from ztune.model import open_model, open_served_model

    if is_url(target):
        given = server_settings(arguments)
        settings = merge_settings(saved or {}, given)
        named = parse_named_server(arguments.bundle or arguments.target)
        provider, threads = arguments.provider, arguments.threads
        if settings.get("images") != "local" and (provider, threads) != ("auto", None):
            raise ConfigError(
                "the server decides how graphs run: leave out --provider and --threads"
            )
        model = open_served_model(
            str(target), settings, named, output, provider=provider, threads=threads
        )
        if TEXTS in model.runtime.missing:
            model.close()
            raise ConfigError(
                f"{target} provides only losses, and scoring needs text features (use the bundle: "
                "ztune eval RUN --bundle DIR, or ztune eval BUNDLE --prompt FILE)"
            )
        return model
    require_no_server_options(arguments)
    execution = resolve_execution(arguments.provider, arguments.threads, output)
    return open_model(Path(target), execution, output)


def _check_bundle_options(arguments: argparse.Namespace) -> None:
    """Refuse options that do not apply to a bundle.

    Raises: ConfigError.
    """
    if arguments.prompt is not None and arguments.templates is not None:
        raise ConfigError("--prompt and --template are mutually exclusive (give one)")
    if arguments.bundle is not None:
        raise ConfigError("--bundle applies only to a run (leave it out)")
    if arguments.snapshots:
        raise ConfigError("--snapshots applies only to a run (leave it out)")


def _eval_bundle(arguments: argparse.Namespace, model: Model, output: Output) -> None:
    from ztune.artifact import HeadArtifact, inliers_of, read_artifact, require_same_model
    from ztune.data.manifests import read_class_list
    from ztune.evaluate import find_extractor, score_bundle
    from ztune.foreign import read_foreign, refusals_of

    images = _labelled(arguments, output)
    candidates, whose = images.classes, "of the images"
    if arguments.classes is not None:
        candidates, whose = read_class_list(arguments.classes), f"of {arguments.classes}"
    artifact, extractor = None, None
    templates = tuple(arguments.templates or ("a photo of a {}.",))
    if arguments.prompt is not None:
        artifact = read_artifact(arguments.prompt)
        require_same_model(artifact, model.bundle.model_id, arguments.prompt, model.bundle.path)
        extractor = find_extractor(artifact, arguments.prompt)
        known = set(images.classes) <= set(artifact.classes)
        if arguments.classes is None and (known or isinstance(artifact, HeadArtifact)):
            candidates, whose = artifact.classes, "of the prompt"
        artifact = model.refresh(artifact, candidates)
        candidates = artifact.classes
        name = f"prompt {arguments.prompt.name}"
    else:
        name = f'template "{templates[0]}"' if len(templates) == 1 else "mean of the templates"
    output.remark(f"candidates: {len(candidates)} classes ({whose})")
    test = None if artifact is None else inliers_of(artifact)
    foreign = read_foreign(arguments.foreign, test, output)
    result, features = score_bundle(
        model,
        images,
        candidates,
        artifact=artifact,
        templates=templates,
        cache=arguments.cache,
        extractor=extractor,
        skip_broken=arguments.skip_broken,
    )
    refusals = refusals_of(artifact, images, features, foreign)
    document = images.document(result, features.plain.kept, artifact, refusals)
    _finish(document, {name: result}, refusals, output)


def _eval_classifier(arguments: argparse.Namespace, output: Output) -> None:
    from runtimes.classifier import classify, open_classifier
    from runtimes.providers import resolve_execution
    from ztune.foreign import read_foreign, refusals_of_classifier

    for name in ("prompt", "templates", "classes", "cache", "bundle", "snapshots"):
        if name in arguments.given:
            option = arguments.given[name]
            raise ConfigError(f"{option} does not apply to a packed classifier (leave it out)")
    classifier = open_classifier(
        arguments.target, resolve_execution(arguments.provider, arguments.threads, output)
    )
    images = _labelled(arguments, output)
    labels = images.among(classifier.classes, "the classifier's classes")
    paths = [path for path, _ in images.items]
    foreign = read_foreign(arguments.foreign, classifier.reject, output)
    outputs, kept = classify(classifier, paths, arguments.skip_broken, output)
    result = score(outputs.logits, labels[kept], classifier.classes, classifier.temperature)
    refusals = refusals_of_classifier(
        classifier, images, outputs, foreign, skip_broken=arguments.skip_broken, progress=output
    )
    document = images.document(result, kept, classifier, refusals)
    _finish(document, {arguments.target.name: result}, refusals, output)


def _labelled(arguments: argparse.Namespace, output: Output) -> LabelledImages:
    """Return the images that --data or --split-file name."""
    from ztune.evaluate import labelled_of_split, read_labelled

    if arguments.data is None and arguments.split_file is None:
        raise ConfigError("--data FOLDER or --split-file RUN/split.json is required")
    if arguments.test_data is not None and arguments.split_file is None:
        raise ConfigError("--test-data applies only to a run or --split-file (leave it out)")
    split = arguments.split or "test"
    if arguments.split_file is not None:
        for name in ("names", "nested", "root"):
            if name in arguments.given:
                raise ConfigError(
                    f"--{name} does not apply to --split-file, which has paths and class names "
                    "(leave it out)"
                )
        return labelled_of_split(
            arguments.split_file,
            split,
            data=arguments.data,
            test_data=arguments.test_data,
            pipe=True,
        )
    place = place_of(arguments.data, arguments.root)
    return read_labelled(
        place, arguments.root, arguments.names, split, output, nested=arguments.nested
    )


def _refusal_lines(refusals: Refusals | None) -> list[str | Table]:
    names = ("none of the classes", "", "95 % interval", "images")
    return [] if refusals is None else ["", Table("", names, refusals.rows())]


def _finish(
    document: dict[str, Json],
    scores: Mapping[str, Score],
    refusals: Refusals | None,
    output: Output,
) -> None:
    if document["tuning_images"]:
        output.warn(
            f"{document['tuning_images']} of these {document['n']} images were used for "
            "tuning or validation: this is not a test accuracy"
        )
    rows = [
        (
            name,
            f"{s.accuracy:.1%}",
            f"{s.interval[0]:.1%} to {s.interval[1]:.1%}",
            *(f"{s.ece:.1%}", f"{s.nll:.2f}", f"{s.brier:.2f}"),
        )
        for name, s in scores.items()
    ]
    title = f"accuracy on {document['n']} images ({document['split']})"
    columns = ("", "accuracy", "95 % interval", "ECE", "NLL", "Brier")
    lines: list[str | Table] = [Table(title, columns, rows)]
    lines += _refusal_lines(refusals)
    own = [s.per_class() for s in scores.values()]
    per_class = [
        (name, str(first["n"]), *(f"{one[name]['accuracy']:.1%}" for one in own))
        for name, first in own[0].items()
    ]
    lines += ["", Table("", ("class", "images", *scores), per_class)]
    output.result(document, lines)
