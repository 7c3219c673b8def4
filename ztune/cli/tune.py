"""`ztune tune`: from a bundle and a folder of pictures to a prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from ztune.cli.output import Output, table
from ztune.cli.request import Request, request_from_json
from ztune.config import settings_from_words
from ztune.errors import ConfigError, FormatError
from ztune.fields import Fields
from ztune.methods import METHODS, PRESETS, find_method
from ztune.types import Json

EXAMPLE = """\
  ztune tune models/mini --data examples/digits --shots 16 --out runs/digits
  ztune tune bundles/vit-b-32 --data photos --method gda --out runs/photos-gda
  ztune tune bundles/vit-b-32 --data photos --set step_size=0.02 --out runs/photos
  ztune tune --resume runs/photos"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder, or .csv/.jsonl list")
    parser.add_argument("--out", type=Path, metavar="RUN", help="new folder for the results")
    parser.add_argument("--shots", type=int, default=16, metavar="N", help="pictures per class")
    parser.add_argument("--method", default="zip", help=f"{' or '.join(METHODS)} (default: zip)")
    parser.add_argument("--queries", type=int, default=5000, metavar="N", help="default: 5000")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--preset", default="default", help=f"{' or '.join(PRESETS)}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method"
    )
    parser.add_argument("--init", metavar="WORDS", help='start from words, say "a photo of a"')
    parser.add_argument(
        "--template", default="a photo of a {}.", help="the prompt of the zero-shot figures"
    )
    parser.add_argument(
        "--val",
        type=int,
        metavar="N",
        help="validation pictures a class (default: min(shots, 4))",
    )
    parser.add_argument(
        "--test-fraction", default="auto", metavar="X", help="kept for testing (default: auto)"
    )
    parser.add_argument("--split-seed", type=int, default=0, metavar="N")
    parser.add_argument("--test-data", type=Path, metavar="FOLDER", help="test pictures elsewhere")
    parser.add_argument("--names", type=Path, metavar="FILE", help="lines of folder<TAB>name")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="default: inside RUN")
    parser.add_argument(
        "--augment", type=int, metavar="K", help="cached random views per training picture"
    )
    parser.add_argument("--skip-broken", action="store_true", help="leave broken pictures out")
    parser.add_argument("--provider", default="auto", help="auto, cpu or cuda (default: auto)")


def run(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.resume is not None:
        for name in ("bundle", "data", "out"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--resume takes everything from the run; leave out {name}")
        document = _resume(arguments.resume, output)
        path = arguments.resume
    else:
        for name in ("bundle", "data", "out"):
            if getattr(arguments, name) is None:
                shown = "BUNDLE" if name == "bundle" else f"--{name}"
                raise ConfigError(f"tune needs {shown} (see: ztune tune --help)")
        document = _start(_request(arguments), arguments.out, output)
        path = arguments.out
    _judge(document, output)
    output.result(document, _lines(document, path))


def _request(arguments: argparse.Namespace) -> Request:
    settings = settings_from_words(arguments.set)
    if arguments.init is not None:
        settings["init"] = arguments.init

    def absolute(path: Path | None) -> str | None:
        return str(path.resolve()) if path is not None else None

    augment = arguments.augment
    if augment is None:
        augment = find_method(arguments.method).augment.get(arguments.preset, 0)
    return Request(
        bundle=str(arguments.bundle.resolve()),
        data=str(arguments.data.resolve()),
        method=arguments.method,
        shots=arguments.shots,
        queries=arguments.queries,
        seed=arguments.seed,
        template=arguments.template,
        preset=arguments.preset,
        provider=arguments.provider,
        val=arguments.val,
        test_fraction=arguments.test_fraction,
        split_seed=arguments.split_seed,
        test_data=absolute(arguments.test_data),
        names=absolute(arguments.names),
        cache=absolute(arguments.cache),
        augment=augment,
        skip_broken=arguments.skip_broken,
        settings=settings,
    )


def _start(request: Request, out: Path, output: Output) -> dict[str, Json]:
    from ztune.cli.tuning import Work, opening, start_config
    from ztune.cli.workbench import open_workbench
    from ztune.data.folders import read_dataset
    from ztune.data.split import digest_pictures, make_split
    from ztune.run import RunFolder

    start_config(request)
    settings = request.split_settings()
    bench = open_workbench(Path(request.bundle), request.provider, output)
    names = Path(request.names) if request.names else None
    dataset = read_dataset(Path(request.data), names)
    test_data = None
    if request.test_data:
        other = read_dataset(Path(request.test_data), names)
        test_data = other, digest_pictures(other)
    split = make_split(dataset, digest_pictures(dataset), settings, test_data)
    if request.preset == "published" and request.method == "zip":
        output.remark(
            f"preset published: random crops anew each step are approximated by {request.augment} "
            "cached views per picture"
        )
    for note in split.notes:
        output.remark(note)
    counts = [len(split.entries_of(role)) for role in ("train", "val", "test")]
    output.remark(
        f"{len(split.classes)} classes: {counts[0]} pictures to tune with, {counts[1]} for "
        f"validation, {counts[2]} kept for testing"
    )
    folder = RunFolder(out)
    work = Work(request, split, folder, bench)
    work.check_names()
    head = opening(request, bench, split)
    folder.create(head, split.to_json())
    with _told_how_to_resume(out):
        return work.carry_out(head)


def _resume(path: Path, output: Output) -> dict[str, Json]:
    from runtimes.bundle import load_bundle
    from runtimes.providers import resolve
    from ztune.cli.tuning import Work
    from ztune.cli.workbench import Workbench
    from ztune.data.split import Split
    from ztune.files import read_json
    from ztune.run import RunFolder

    folder = RunFolder(path)
    head = folder.read()
    where = f'run "{path}": run.json'
    if head.get("status") == "finished":
        output.remark(f"{path} is finished; nothing to do")
        return {key: value for key, value in head.items() if key not in ("format", "version")}
    fields = Fields(head, where)
    request = request_from_json(fields.object("request").values, where)
    bundle = load_bundle(Path(request.bundle))
    if bundle.digest != fields.text("bundle_digest"):
        raise FormatError(
            f'bundle "{bundle.path}" is not the one that the run began with (put it back, or start '
            "a new run)"
        )
    provider, _ = resolve(fields.text("provider"))
    split = Split.from_json(read_json(folder.split, where), f'run "{path}": split.json')
    split.check_unchanged()
    bench = Workbench(bundle, provider, output)
    kept = {key: value for key, value in head.items() if key not in ("format", "version")}
    with _told_how_to_resume(path):
        return Work(request, split, folder, bench).carry_out(kept)


class _told_how_to_resume:  # noqa: N801 - reads as a phrase behind `with`
    """Give an interruption the command that goes on."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"go on with: ztune tune --resume {self._path}") from None


def _judge(document: dict[str, Json], output: Output) -> None:
    """Warn where tuning was not worth it."""
    validation = document.get("validation")
    if not isinstance(validation, dict) or not validation:
        return
    accuracy = {
        name: Fields(validation, "run").object(name).number("accuracy") for name in validation
    }
    if accuracy["tuned"] <= accuracy["zero-shot"]:
        output.warn(
            f"on the validation pictures the result ({accuracy['tuned']:.1%}) does not beat the "
            f"hand-written prompt ({accuracy['zero-shot']:.1%})"
        )


def _lines(document: dict[str, Json], path: Path) -> list[str | Table]:
    fields = Fields(document, "run.json")
    lines: list[str | Table] = []
    validation = fields.object("validation")
    rows = []
    for name, shown in (
        ("zero-shot", "zero-shot"),
        ("tuned", f"tuned ({fields.text('method')})"),
        ("gda", "GDA"),
    ):
        if name in validation.values:
            part = validation.object(name)
            low, high = part.numbers("interval", 2)
            rows.append((shown, f"{part.number('accuracy'):.1%}", f"{low:.1%} to {high:.1%}"))
    if rows:
        n = validation.object("tuned").integer("n")
        title = f"accuracy on {n} validation pictures (GDA's alpha was chosen on them)"
        lines.append(table(title, ("", "accuracy", "95 % interval"), rows))
    else:
        lines.append("no validation pictures, so nothing to compare with here (see: ztune eval)")
    lines.append(
        f"{fields.integer('queries')} queries, {fields.integer('text_forwards')} text forwards, "
        f"{fields.integer('image_forwards')} image forwards, {fields.number('seconds'):.1f} s, "
        f"peak memory {fields.number('peak_memory_mb'):.0f} MB"
    )
    lines.append(f"{path / 'prompt.safetensors'} (measure it with: ztune eval {path})")
    return lines
