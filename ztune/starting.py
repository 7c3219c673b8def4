"""Start a run: read its images, check the request, and train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from runtimes.preprocess import perceptual_hash, reason_broken
from ztune.checks import as_possible
from ztune.data.folders import Listing
from ztune.data.sources import read_source
from ztune.data.split import HOW_DRAWN, Split
from ztune.data.splitter import NEAR_COPIES, Digest, Screening, digest_file, make_split
from ztune.encoded import EncodedSplit
from ztune.io.schema import plain
from ztune.methods.registry import find_method, preset_of
from ztune.model import Model
from ztune.printing import first_few
from ztune.progress import warn
from ztune.run import RunFolder
from ztune.run_config import RunConfig, remarks_on
from ztune.run_document import RunReport
from ztune.training import TrainingRun


def start_run(
    run_config: RunConfig,
    model: Model,
    path: Path,
    on_start: Callable[[], None] = lambda: None,
    *,
    overwrite: bool = False,
) -> RunReport:
    """Start a run in a new folder and finish it; return run.json's content.

    `on_start` is called once the run can be resumed. `overwrite` replaces an existing run after all
    checks that need no images.

    Raises: ZtuneError for an impossible request, before anything is written; RefusedError if the
        precision leaves too little signal.
    """
    RunFolder(path).require_free(overwrite=overwrite)
    run_config = as_possible(run_config, model)
    dataset, split = read_split(run_config)
    for remark in _remarks_on_start(run_config, dataset, split):
        if remark.startswith(NEAR_COPIES):
            warn(remark)
        else:
            model.progress.remark(remark)
    return start_run_on(run_config, split, model, path, on_start=on_start, overwrite=overwrite)


def start_run_on(
    run_config: RunConfig,
    split: Split,
    model: Model,
    path: Path,
    encoded: EncodedSplit | None = None,
    on_start: Callable[[], None] = lambda: None,
    *,
    overwrite: bool = False,
) -> RunReport:
    """Start a run on a split in a new folder and finish it; return run.json's content.

    `encoded` are the split's features, if known; `overwrite` is as for `start_run`.

    Raises: as `start_run`.
    """
    folder = RunFolder(path)
    run = TrainingRun(run_config, split, folder, model, encoded)
    run.check(new=True)
    head = run.head()
    with folder.create_locked(plain(head), split.to_json(), overwrite=overwrite):
        on_start()
        return run.finish(head)


def _remarks_on_start(run_config: RunConfig, dataset: Listing, split: Split) -> Iterator[str]:
    yield from remarks_on(run_config)
    views = preset_of(find_method(run_config.method), run_config.preset).views
    # One view is what the published code has, and so are the views of heads.
    if run_config.tuned_config and views > 1 and run_config.augment:
        yield (
            f"preset {run_config.preset}: new random crops in each step are approximated by "
            f"{run_config.augment} cached views per image"
        )
    yield from dataset.remarks
    yield from split.notes
    counts = [len(split.entries_of(role)) for role in ("train", "val", "test")]
    yield (
        f"{len(split.classes)} classes ({first_few(split.classes, 10)}): {counts[0]} training, "
        f"{counts[1]} validation and {counts[2]} test images; {HOW_DRAWN[split.sampler]}"
    )


def read_split(run_config: RunConfig, digest: Digest = digest_file) -> tuple[Listing, Split]:
    """Return a run's images and their split.

    Raises: ConfigError, DataError.
    """
    settings = run_config.split_settings()
    names = Path(run_config.names) if run_config.names else None
    root = Path(run_config.root) if run_config.root else None
    nested = run_config.nested
    dataset = read_source(run_config.data, root, names, nested=nested)
    test_data = None
    if run_config.test_data:
        test_data = read_source(run_config.test_data, None, names, tuned=False, nested=nested)
    screening = Screening(
        run_config.skip_broken, run_config.skip_conflicts, reason_broken, hash_of=perceptual_hash
    )
    return dataset, make_split(dataset, settings, test_data, digest, screening)
