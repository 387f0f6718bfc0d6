"""The train stage: one variant into its folder of the run root; continues what is unfinished."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from app.config import MACHINE_KEYS, Config, UserError, config_hash, difference, dump, flatten, read_yaml, validate
from app.curves import write_loss_curve
from app.device import check_device
from app.monitor import log_file
from app.run import RunRoot, environment, read_json, record_stage, sha256, utc_now, write_json, write_text
from app.trainer import Trainer

log = logging.getLogger(__name__)


def train(config: Config, run: RunRoot, force: bool) -> None:
    """Trains one variant into runs/<name>/<label>; continues an unfinished training, refuses another configuration.

    Raises:
        UserError: the folder holds a training of another configuration, no dataset was prepared, or the device or
            shared memory does not suffice.
    """
    out_dir = run.variant_dir(config.label)
    if force and out_dir.exists():
        shutil.rmtree(out_dir)
    check_snapshot(config, out_dir / "config.yaml")
    done_json = out_dir / "done.json"
    if done_json.exists():
        done = read_json(done_json, "train")
        log.info("train %s: done already (%d epochs, best AP %.3f)", config.label, done["epochs"], done["best_ap"])
        return
    device = check_device(config)
    read_json(run.provenance, "data")
    write_text(out_dir / "config.yaml", dump(config))
    with log_file(out_dir / "log.txt"):
        trainer = Trainer(overrides=ultralytics_args(config, run, device))
        write_json(out_dir / "env.json", {**environment(), **trainer.facts()})
        log.info("train %s: %s", config.label, trainer.headline())
        trainer.train()
    write_loss_curve(out_dir)
    facts = {"epochs": config.train.epochs, "best_ap": trainer.best_fitness, "config_hash": config_hash(config)}
    record_stage(run, f"train {config.label}", facts)
    write_json(done_json, {**facts, "best_sha256": sha256(trainer.best), "time_utc": utc_now()})


def check_snapshot(config: Config, snapshot: Path) -> None:
    """Compares with the configuration that a folder was trained with, as far as training depends on it."""
    if not snapshot.exists():
        return
    later_stages = tuple(key for key in flatten(config) if key.split(".")[0] in ("guard", "export", "eval", "report"))
    differences = difference(validate(read_yaml(snapshot)), config, ignore=(*MACHINE_KEYS, *later_stages))
    if differences:
        shown = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in differences.items())
        raise UserError(
            f"{snapshot.parent} was trained with another configuration ({shown}): take another RUN=name, or start over "
            "with ARGS=--force"
        )


def ultralytics_args(config: Config, run: RunRoot, device: str) -> dict[str, Any]:
    """Arguments of Ultralytics' trainer. nms=False makes its validation score the one2one head."""
    t = config.train
    return {
        "model": config.model,
        "data": str(run.dataset_yaml.resolve()),
        "save_dir": str(run.variant_dir(config.label).resolve()),
        "epochs": t.epochs,
        "batch": t.batch,
        "imgsz": t.imgsz,
        "seed": t.seed,
        "deterministic": t.deterministic,
        "amp": t.amp,
        "workers": t.workers,
        "device": device,
        "cache": "ram" if t.cache else False,
        "pretrained": False,
        "nms": False,
        "patience": 0,
        "plots": False,
        "verbose": False,
        "exist_ok": True,
        **config.hyp.model_dump(),
    }
