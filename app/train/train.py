"""The train stage: one variant into its folder of the run root; continues what is unfinished."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path

from app.core.config import (
    WITHOUT_EFFECT,
    Config,
    UserError,
    config_hash,
    difference,
    dump,
    read_yaml,
    shown,
    validate,
)
from app.core.curves import write_loss_curve
from app.core.environment import environment, utc_now
from app.core.files import read_json, sha256, write_json, write_text
from app.core.run import VIEW_SHAPE, RunRoot, record_stage
from app.core.scheme import keep_scheme
from app.core.shapes import Count, Number, Shape
from app.train.device import check_devices
from app.train.loop import Loop
from app.train.monitor import log_file
from app.train.processes import ALONE, Ranks
from app.train.trainer import Trainer

OTHER_RUN = "take another RUN=name, or start over with ARGS=--force"
DONE_SHAPE: Shape = {"epochs": Count, "best_ap": Number}
log = logging.getLogger(__name__)


def train(config: Config, run: RunRoot, force: bool, ranks: Ranks = ALONE) -> None:
    """Trains one variant into runs/<name>/<label>; continues an unfinished training, refuses another configuration.

    Where `ranks` are several processes, each of them calls this function; rank 0 writes.

    Raises:
        UserError: the folder holds a training of another configuration, no dataset was prepared, or the device or
            shared memory does not suffice.
    """
    out_dir = run.variant_dir(config.label)
    device = device_of(config, ranks)
    if not ranks.broadcast(ranks.is_main and make_ready(config, run, force)):
        return
    with log_file(out_dir / "log.txt") if ranks.is_main else contextlib.nullcontext():
        trainer = Trainer(config, run, device, ranks)
        if ranks.is_main:
            write_json(out_dir / "env.json", {**environment(), **trainer.facts()})
        log.info("train %s: %s", config.label, trainer.headline())
        loop = Loop(trainer)
        loop.run()
    if not ranks.is_main:
        return
    write_loss_curve(out_dir)
    best_ap, best_sha256 = loop.state.best_fitness, sha256(trainer.best)
    facts = {"epochs": config.train.epochs, "best_ap": best_ap, "config_hash": config_hash(config)}
    record_stage(run, f"train {config.label}", facts)
    write_json(out_dir / "done.json", {**facts, "best_sha256": best_sha256, "time_utc": utc_now()})


def make_ready(config: Config, run: RunRoot, force: bool) -> bool:
    """Makes the variant's folder; False where its training is done already."""
    out_dir = run.variant_dir(config.label)
    if force and out_dir.exists():
        shutil.rmtree(out_dir)
    check_snapshot(config, out_dir / "config.yaml")
    done_json = out_dir / "done.json"
    if done_json.exists():
        done = read_json(done_json, "train", DONE_SHAPE)
        log.info("train %s: done already (%d epochs, best AP %.3f)", config.label, done["epochs"], done["best_ap"])
        return False
    read_json(run.provenance, "data", VIEW_SHAPE)
    # Ultralytics deletes results.csv too, in every process at once (engine/trainer.py __init__, 8.4.190).
    (out_dir / "results.csv").unlink(missing_ok=True)
    write_text(out_dir / "config.yaml", dump(config))
    if config.quant:
        keep_scheme(config.quant.scheme, out_dir)
    return True


def device_of(config: Config, ranks: Ranks) -> str:
    """This process's device: the entry of train.device with its number on this machine; all processes share a CPU.

    Raises:
        UserError: train.device names fewer GPUs than torchrun has started processes.
    """
    devices = check_devices(config)
    if set(devices) == {"cpu"}:
        return "cpu"
    if ranks.local >= len(devices):
        raise UserError(
            f"torchrun started {ranks.n_local} processes on this machine, train.device names {len(devices)} GPU(s): "
            f"start it with --nproc-per-node={len(devices)}"
        )
    return devices[ranks.local]


def check_snapshot(config: Config, snapshot: Path) -> None:
    """Compares with the configuration that a folder was trained with, as far as training depends on it.

    What ended before its first checkpoint was not trained.

    Raises:
        UserError: another configuration, or one that another version of this program has written.
    """
    if not snapshot.exists() or not any((snapshot.parent / "weights").glob("last*.pt")):
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
