"""Whether a training, or PTQ, is done already: read from the run's files, without importing PyTorch."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from app.core.config import Config, Quant, UserError, dump, read_yaml, validate
from app.core.differences import WITHOUT_EFFECT, difference, shown
from app.core.files import read_json, sha256, write_json, write_text
from app.core.labels import FP16, Label
from app.core.results import read_rows
from app.core.run import VIEW_SHAPE, RunRoot
from app.core.scheme import Scheme, changed_rules, keep_scheme, kept_scheme
from app.core.shapes import Count, Number, Shape, misfits
from app.core.start import told
from app.data.prepare import prepare

WARMUP = "warmup_from.json"  # in a variant's folder: the hash of the checkpoint that quant.warmup_from named
TEACHER = "teacher.json"  # in a variant's folder: file name and hash of the checkpoint that it learns from
IMAGES = "images.json"  # in a variant's folder: the hashes of what a training that has begun reads
HASHES = ("annotation_sha256", "image_ids_sha256", "images_sha256")  # of a split; the last is not in older runs
OTHER_RUN = "take another RUN=name, or start over with ARGS=--force"
DONE_SHAPE: Shape = {"epochs": Count, "best_ap": Number}
IMPORTED_SHAPE: Shape = {"imported": dict[str, str], "imported.file": str, "imported.sha256": str}
IMAGES_SHAPE: Shape = {"images.train": dict[str, str], "images.val": dict[str, str]}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class After:
    """What a job has to do after a training: epochs of a QAT training, and ONNX files to score."""

    qat_epochs: int = 0
    files: int = 0


def is_trained(config: Config, run: RunRoot) -> bool:
    """Whether the variant's training is done on the dataset as it is now; logs that it is.

    Raises:
        UserError: the folder holds a training of another configuration, or the dataset cannot be used or is another.
    """
    if not run.done(config.label).exists():
        return False
    prepare(config, run, force=False, says_done=False)
    return is_finished(config, run)


def is_finished(config: Config, run: RunRoot) -> bool:
    """As `is_trained`, whatever became of the dataset."""
    if imported := imported_into(run, config.label):
        raise UserError(
            f"{run.variant_dir(config.label)} holds imported weights ({told(imported)}) and no training: {OTHER_RUN}"
        )
    check_snapshot(config, run.variant_dir(config.label) / "config.yaml")
    check_images(config, run)
    if not run.done(config.label).exists():
        return False
    done = read_json(run.done(config.label), "train", DONE_SHAPE)
    log.info("train %s: done already (%d epochs, best AP %.3f)", config.label, done["epochs"], done["best_ap"])
    return True


def make_ready(config: Config, run: RunRoot, force: bool) -> bool:
    """Makes the variant's folder; False where its training is done already.

    Raises:
        UserError: the folder holds a training of another configuration, or no dataset was prepared.
    """
    out_dir = run.variant_dir(config.label)
    if force and out_dir.exists():
        shutil.rmtree(out_dir)
    if is_finished(config, run):
        return False
    read_json(run.provenance, "data", VIEW_SHAPE)
    # Ultralytics deletes results.csv too, in every process at once (engine/trainer.py __init__, 8.4.190).
    (out_dir / "results.csv").unlink(missing_ok=True)
    write_text(out_dir / "config.yaml", dump(config))
    if config.quant:
        keep_scheme(config.quant.scheme, out_dir)
    if config.warmup_from and config.warmup_from.is_file():
        check_source("quant.warmup_from", config.warmup_from, run)
        write_json(out_dir / WARMUP, {"sha256": sha256(config.warmup_from)})
    if teacher := teacher_path(config, run.root):
        write_json(out_dir / TEACHER, teacher_facts(teacher))
        check_source("quant.distill", teacher, run)
    if not has_begun(out_dir):
        write_json(out_dir / IMAGES, {"images": images_now(run)})
    return True


def images_now(run: RunRoot) -> dict[str, dict[str, str]]:
    """The hashes of the images and annotations of 'train' and 'val', as the data stage has seen them last."""
    hashes = {}
    for split, facts in read_json(run.provenance, "data", VIEW_SHAPE)["splits"].items():
        hashes[split] = {key: facts[key] for key in HASHES if key in facts}
    return hashes


def check_images(config: Config, run: RunRoot) -> None:
    """Refuses a training, done or begun, on other images or annotations than the run has now; `data --force` takes any.

    Raises:
        UserError: names the split.
    """
    folder = run.variant_dir(config.label)
    if not run.provenance.exists() or not has_begun(folder):
        return
    kept = images_of(folder)
    if kept is None:
        log.warning("train %s: an earlier version began it, which did not record of which images", config.label)
        return
    if split := other_split(kept, images_now(run)):
        raise UserError(
            f"{folder} was trained with other {split} images or annotations than {run.provenance.parent} has now: "
            f"{OTHER_RUN}"
        )


def images_of(folder: Path) -> dict[str, dict[str, str]] | None:
    """As `images_now`, of what the training in this folder has read; None where no record says it."""
    record = folder / "done.json" if (folder / "done.json").exists() else folder / IMAGES
    if not record.exists() or "images" not in read_json(record, "train"):
        return None
    return read_json(record, "train", IMAGES_SHAPE)["images"]


def other_split(kept: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> str | None:
    """The first split whose images or annotations differ, as far as both hashes are known."""
    for split, hashes in now.items():
        if any(hashes[key] != kept[split].get(key, hashes[key]) for key in hashes):
            return split
    return None


def check_source(key: str, path: Path, run: RunRoot) -> None:
    """Refuses a checkpoint of a training on other images than the run has, where the folder of that training tells.

    Raises:
        UserError: names the split; `key` is the setting that takes the checkpoint.
    """
    kept = images_of(folder_of(path))
    if kept and (split := other_split(kept, images_now(run))):
        raise UserError(
            f"{key}: {path} was trained with other {split} images or annotations than {run.provenance.parent} has: "
            "name a checkpoint of the same dataset"
        )


def folder_of(path: Path) -> Path:
    """The variant's folder of a checkpoint in its weights/."""
    return path.absolute().parent.parent


def imported_into(run: RunRoot, label: Label | str) -> dict[str, str] | None:
    """File name and sha256 of the checkpoint that import-weights put under this label; None where it did not."""
    if not run.done(label).exists():
        return None
    done = read_json(run.done(label), "train")
    return done["imported"] if not misfits(done, IMPORTED_SHAPE) else None


def check_snapshot(config: Config, snapshot: Path) -> None:
    """Compares with the configuration that a folder was trained with, as far as training depends on it.

    What ended before its first step was not trained. A finished training may lack last.pt, which may be deleted.

    Raises:
        UserError: another configuration, or one that another version of this program has written.
    """
    folder = snapshot.parent
    if not snapshot.exists() or not has_begun(folder):
        return
    try:
        trained_with = validate(read_yaml(snapshot))
    except UserError as error:
        raise UserError(
            f"{snapshot.parent} was trained by another version of this program ({error}): go on with that version, "
            f"{OTHER_RUN}"
        ) from error
    if differences := difference(trained_with, config, ignore=tuple(WITHOUT_EFFECT)):
        raise UserError(f"{snapshot.parent} was trained with another configuration ({shown(differences)}): {OTHER_RUN}")
    check_warmup(config, folder / WARMUP)
    check_teacher(config, folder / TEACHER)


def has_begun(folder: Path) -> bool:
    """Whether a variant's folder holds a training, done or with a checkpoint of a step."""
    return (folder / "done.json").exists() or any((folder / "weights").glob("last*.pt"))


def check_warmup(config: Config, record: Path) -> None:
    """Refuses another checkpoint under the path of quant.warmup_from than the training began from.

    One that is gone is asked for nothing: its epochs are in the training.
    """
    path = config.warmup_from
    if path is None or not path.is_file() or not record.exists():
        return
    if read_json(record, "train", {"sha256": str})["sha256"] != sha256(path):
        raise UserError(f"{record.parent} began from another checkpoint than quant.warmup_from={path}: {OTHER_RUN}")


def teacher_path(config: Config, run_root: Path) -> Path | None:
    """The checkpoint that a QAT training learns from: quant.teacher or best.pt of its run's FP16; None without any."""
    quant = config.quant
    if quant is None or not quant.distill:
        return None
    return Path(quant.teacher) if quant.teacher else RunRoot(run_root.parent, run_root.name).best(FP16)


def teacher_facts(path: Path) -> dict[str, str]:
    """File name and sha256 of the teacher.

    Raises:
        UserError: its training has not finished.
    """
    if not path.is_file() or not (folder_of(path) / "done.json").exists():
        raise UserError(
            f"quant.distill: {path} is not there, or its training has not finished: run 'make train-fp16' first, or "
            "name best.pt of another finished one as quant.teacher"
        )
    return {"file": path.name, "sha256": sha256(path)}


def check_teacher(config: Config, record: Path) -> None:
    """Refuses another teacher than the training began with. One that is gone is refused where it is read."""
    path = teacher_path(config, record.parents[1])
    if path is None or not path.is_file() or not record.exists():
        return
    if read_json(record, "train", {"sha256": str})["sha256"] != sha256(path):
        raise UserError(f"{record.parent} was distilled from another checkpoint than {path} is now: {OTHER_RUN}")


def epochs_left(config: Config, run: RunRoot) -> int:
    """How many epochs of a training are still to come, by its files; what cannot be read counts as not begun."""
    if run.done(config.label).exists():
        return 0
    try:
        rows = read_rows(run.variant_dir(config.label) / "results.csv")
    except (OSError, ValueError):
        rows = []
    return max(config.train.epochs - len(rows), 0)


# --- PTQ -------------------------------------------------------------------------------------------------------------


def ptq_labels(quant: Quant) -> tuple[Label, Label]:
    """The two checkpoints of PTQ: as it is, and with BatchNorm re-estimated."""
    return Label("ptq", quant.scheme.name), Label("ptq", quant.scheme.name, bn=True)


def is_quantized(run: RunRoot, label: Label, source_sha256: str, scheme: Scheme) -> bool:
    """Whether the checkpoint of a label of PTQ is there and was made of this baseline with this scheme.

    Raises:
        UserError: it was made of another baseline or another scheme: a finished result is not overwritten unasked.
    """
    if not run.done(label).exists() or not run.best(label).exists():
        return False
    if read_json(run.done(label), "ptq", {"source_sha256": str})["source_sha256"] != source_sha256:
        raise UserError(f"{run.best(label)} was made with another source_sha256: overwrite it with --force")
    kept = kept_scheme(run.variant_dir(label), scheme.name)
    if rules := changed_rules(kept, scheme):
        raise UserError(f"{run.best(label)} was made with {rules[0]}, now it is {rules[1]}: overwrite it with --force")
    quant_config = run.variant_dir(label) / "quant_config.json"
    known = read_json(quant_config, "ptq") if kept is None and quant_config.exists() else {}
    if known.get("scheme_sha256", scheme.sha256) != scheme.sha256:
        raise UserError(f"{run.best(label)} was made with other rules of {scheme}: overwrite it with --force")
    return True


def is_ptq_done(config: Config, run: RunRoot) -> bool:
    """Whether all that PTQ makes of the baseline is there; logs that it is.

    What is wrong with a file is no error here: the stage says it, after it has read the baseline.
    """
    source = run.best(FP16)
    if config.quant is None or not source.exists():
        return False
    labels = ptq_labels(config.quant)
    source_sha256 = sha256(source)
    try:
        done = all(is_quantized(run, label, source_sha256, config.quant.scheme) for label in labels)
    except UserError:
        return False
    if done:
        log.info("ptq %s: done already (%d checkpoints)", config.quant.scheme, len(labels))
    return done
