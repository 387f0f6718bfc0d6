"""The sensitivity stage: measures layers of the trained FP16 checkpoint, and proposes a scheme within a budget."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.core.config import Config, UserError
from app.core.files import read_json, write_json, write_text
from app.core.progress import clock
from app.core.run import RunRoot, record_stage
from app.core.shapes import Shape
from app.sensitivity import page
from app.sensitivity.additive import correlations, sums_of
from app.sensitivity.changes import GROUP, LAYER, MEASURED_BITS, Change, all_changes, groups_of, learned_layers, single
from app.sensitivity.images import batches_of
from app.sensitivity.measure import Kept, float_loss, measure_all, summary
from app.sensitivity.proposal import propose_scheme, read_wanted
from app.sensitivity.subject import Subject

SHAPE: Shape = {"key": dict[str, Any], "batches": list[dict[str, Any]], "layers": list[dict[str, Any]]}
log = logging.getLogger(__name__)


def sensitivity(config: Config, run: RunRoot, force: bool, budget: tuple[str, str] | None) -> None:
    """Writes runs/<name>/sensitivity/: sensitivity.json, sensitivity.md and its figure.

    With a budget, an option and its value, also a scheme file and the page that scores it.

    Raises:
        UserError: no trained FP16 baseline, a result of another baseline or other settings without `force`, or, before
            anything is measured, a budget that the network cannot have.
    """
    subject = Subject(config, run)
    result_path = run.root / "sensitivity" / "sensitivity.json"
    wanted = read_wanted(subject, budget) if budget else None
    if force:
        forget(result_path)
    if not is_measured(result_path, subject.key):
        measure(subject, result_path)
    if wanted:
        propose_scheme(subject, read_json(result_path, "sensitivity", SHAPE), wanted)


def forget(path: Path) -> None:
    """Deletes a result and the batches of one, so that what is measured next goes on without `force`."""
    for old in (path, partial_of(path)):
        old.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """The batches of a result that is not finished."""
    return path.with_name("partial.json")


def is_measured(path: Path, key: dict[str, Any]) -> bool:
    """Whether the result is there; logs it.

    Raises:
        UserError: it is that of another baseline or of other settings.
    """
    if not path.exists():
        return False
    recorded = read_json(path, "sensitivity", SHAPE)["key"]
    if differs := [name for name, value in key.items() if recorded.get(name) != value]:
        raise UserError(f"{path} was made with another {' and '.join(differs)}: overwrite it with --force")
    log.info("sensitivity: done already (%s)", path)
    return True


def measure(subject: Subject, path: Path) -> None:
    """Measures all changes and writes the result."""
    settings, chosen = subject.config.sensitivity, subject.chosen
    changes = all_changes(subject.model, settings)
    layers = learned_layers(subject.model)
    log.info(
        "sensitivity %s: %d layers at %s bits, %d val images at 4 bits and %d at the others",
        subject.run.name, len(layers), ", ".join(map(str, MEASURED_BITS)), len(chosen.search),
        min(settings.images_other_bits, len(chosen.search)),
    )  # fmt: skip
    kept = Kept(partial_of(path), subject.key)
    start = time.monotonic()
    batches = measure_all(subject.probe(changes), plan(subject, changes), subject.images.read, kept)
    took_s = time.monotonic() - start
    write_json(path, result_of(subject, changes, batches, took_s))
    kept.path.unlink(missing_ok=True)
    write_text(path.with_name("sensitivity.md"), page.whole(subject.run, read_json(path, "sensitivity", SHAPE)))
    record_stage(subject.run, "sensitivity", {"checkpoint_sha256": subject.key["checkpoint_sha256"]})
    log.info("sensitivity: %s, in %s", path.with_name("sensitivity.md"), clock(took_s))


def plan(subject: Subject, changes: list[Change]) -> list[tuple[list[int], list[Change]]]:
    """Batches of val images with what they measure: the first ones all changes, the others those at 4 bits."""
    settings, places = subject.config.sensitivity, subject.chosen.search
    n_all = min(settings.images_other_bits, len(places))
    main = [change for change in changes if change.is_main]
    first = [(group, changes) for group in batches_of(places[:n_all], settings.batch_images)]
    return [*first, *((group, main) for group in batches_of(places[n_all:], settings.batch_images))]


def result_of(subject: Subject, changes: list[Change], batches: list[dict[str, Any]], took_s: float) -> dict[str, Any]:
    """The content of sensitivity.json."""
    layers = learned_layers(subject.model)
    sums = sums_of(batches, [change for change in changes if change.kind not in (LAYER, GROUP)])
    rows = []
    for name, conv in layers.items():
        rows.append({"name": name, "n_weights": conv.weight.numel(), "bits": numbers_of(batches, name)})
    groups = []
    for name, members in groups_of(subject.model, layers).items():
        groups.append({"name": name, "layers": members, "bits": numbers_of(batches, name)})
    return {
        "key": subject.key,
        "model": subject.config.model,
        "imgsz": subject.config.train.imgsz,
        "classes": len(subject.provenance["names"]),
        "dataset": subject.provenance["title"],
        "device": str(subject.device),
        "seconds": round(took_s, 1),
        "n_images": sum(batch["n"] for batch in batches),
        "float_loss": float_loss(batches),
        "layers": rows,
        "groups": groups,
        "schemes": [asdict(scheme) for scheme in sums],
        "rank_correlation": correlations(sums),
        "batches": batches,
    }


def numbers_of(batches: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """What a layer or group costs, by bits."""
    return {str(bits): asdict(summary(batches, single(name, bits))) for bits in MEASURED_BITS}
