"""The content of run.json at a run's start and once it is finished."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from ztune.data.split import LeftOut
from ztune.io.schema import Count, convert
from ztune.methods.ogn import PROMPTS, STALLED
from ztune.optim.epochs import CANDIDATES
from ztune.run_config import RunConfig
from ztune.types import Json

Status = Literal["running", "finished", "refused", "replaced"]
_LIMITS = {PROMPTS: "most_prompts", CANDIDATES: "most_candidates"}


class RunStart(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """run.json before the run is finished; fields that are None are left out."""

    status: Status
    method: str
    package: str | None = None
    """Name and version of the method's package; None: ztune's own."""
    seed: Count
    config: Mapping[str, Json]
    """All settings of the method; for a finished head those that it chose."""
    provider: str
    precision: str
    model_id: str
    bundle_digest: str
    classes: int
    versions: Mapping[str, Json]
    machine: Mapping[str, Json]
    run_config: RunConfig
    image_forwards: Count | None = None
    image_forwards_cached: Count | None = None
    broken_images: Count | None = None
    conversions: Mapping[str, Count] | None = None
    """How many training and validation images each rule changed (runtimes.conversions)."""
    left_out: LeftOut | None = None
    """Files that are not used."""
    image_seconds: float | None = None
    calls: Mapping[str, Json] | None = None
    """How a round is split into calls or requests."""
    signal: Mapping[str, Json] | None = None


class ValidationScore(Struct, frozen=True):
    """Accuracy on n images that the method did not see."""

    accuracy: float
    interval: tuple[float, float]
    """95 %, Wilson."""
    n: Count

    @property
    def interval_shown(self) -> str:
        return "{:.1%} to {:.1%}".format(*self.interval)


class Calibration(Struct, frozen=True):
    """The temperature of the probabilities, and the images that it was fitted on."""

    temperature: float
    images: Literal["folds", "validation"]
    """folds: training images, each by a fit without it."""
    n: Count


class ServerReport(Struct, frozen=True, kw_only=True):
    """Traffic with a server; requests and bytes are those of the last process."""

    url: str
    capabilities: tuple[str, ...]
    sent: Count
    possibly_billed_twice: Count
    report_queries: Count
    requests: Count
    payload_mb_sent: float
    payload_mb_received: float


class RunReport(RunStart, frozen=True, kw_only=True):
    """run.json of a finished run."""

    image_forwards: Count
    image_forwards_cached: Count
    queries: Count
    probe_queries: Count
    text_forwards: Count
    text_forwards_cached: Count = 0
    """Class prompts found on disk, of an earlier run."""
    seconds: float
    report_seconds: float
    peak_memory_mb: float
    result_bytes: Count
    stop_reason: str
    cuda_graph: str | None
    """Whether a round was captured as a CUDA graph, or why not; None on a CPU."""
    loss: str
    train_loss: float
    """In nats, over all training images and views."""
    val_accuracy: float | None
    validation: Mapping[str, ValidationScore]
    """By name (zero-shot, tuned, gda); empty without validation images."""
    gda_alpha: Json
    cross_validation: ValidationScore | None = None
    """On the training images, each by a fit without it; of methods that make such fits, where every
    class has enough images."""
    hand_written: ValidationScore | None = None
    """With `cross_validation`, the hand-written prompt's accuracy on all training images."""
    calibration: Calibration | None = None
    """None without logits of images to fit a temperature on."""
    server: ServerReport | None = None

    @property
    def own_seconds(self) -> float:
        """Seconds from start to last step, as in the history, without baselines and report."""
        return round(self.seconds - self.report_seconds, 3)

    @property
    def cross_validated(self) -> str | None:
        """The cross-validated accuracy as a line, if known."""
        found, before = self.cross_validation, self.hand_written
        if found is None:
            return None
        zero_shot = "" if before is None else f"; zero-shot {before.accuracy:.1%}"
        return (
            f"cross-validated on {found.n} training images: accuracy {found.accuracy:.1%} "
            f"(95 % interval {found.interval_shown}){zero_shot}"
        )

    @property
    def rejection(self) -> str | None:
        """A line on the images that the result refuses; None: it refuses none."""
        share = self.run_config.reject
        if share is None:
            return None
        return (
            f"refuses images of none of the classes, and about {share:.1%} of images of the classes"
        )

    @property
    def probabilities(self) -> str:
        """A line on what the probabilities were calibrated on."""
        found = self.calibration
        if found is None:
            return "probabilities are not calibrated: no held-out logits to fit a temperature on"
        images = "validation images" if found.images == "validation" else "held-out training images"
        return f"probabilities: temperature {found.temperature:g}, fitted on {found.n} {images}"

    @property
    def no_gain(self) -> str | None:
        """A warning that the result does not beat the hand-written prompt, if so."""
        tuned, zero_shot = self.validation.get("tuned"), self.validation.get("zero-shot")
        where = "on the validation images"
        if tuned is None:
            tuned, zero_shot, where = self.cross_validation, self.hand_written, "cross-validated"
        if tuned is None or zero_shot is None or self.method == "zero-shot":
            return None
        if tuned.accuracy > zero_shot.accuracy:
            return None
        return (
            f"the result ({tuned.accuracy:.1%}) does not beat the hand-written prompt "
            f"({zero_shot.accuracy:.1%}) {where}"
        )

    @property
    def early_end(self) -> str | None:
        """Return a line on why a run ended before its budget; None if it is not worth one."""
        budget, setting = self.run_config.queries, _LIMITS.get(self.stop_reason)
        if self.queries >= budget or budget == RunConfig.queries:
            return None  # the default budget is only a limit
        if self.stop_reason == STALLED:
            return f"ended after {self.queries} queries: the held-out loss stalled (least_gain)"
        if setting is None:
            return None
        return f"stopped before {budget} queries: the method's limit is reached ({setting})"


def run_start(document: Mapping[str, Json], where: str) -> RunStart:
    """Return the content of run.json of a run that may be unfinished.

    Raises: FormatError naming the invalid field.
    """
    convert(
        document.get("run_config"), RunConfig, f"{where}: run_config"
    )  # which names unknown keys
    return convert(document, RunReport if document.get("status") == "finished" else RunStart, where)


def unfinished(head: RunStart) -> RunStart:
    """Return the content of run.json of a run to resume, without the results of a finished one."""
    kept = {name: getattr(head, name) for name in RunStart.__struct_fields__}
    return RunStart(**{**kept, "status": "running"})


def run_report(document: Mapping[str, Json], where: str) -> RunReport:
    """Return the content of run.json of a finished run.

    Raises: FormatError naming the invalid field.
    """
    return convert(document, RunReport, where)
