"""The train stage: one variant into its folder of the run root; continues what is unfinished."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from app.core.config import (
    LATER_STAGES,
    MACHINE_KEYS,
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
from app.core.run import RunRoot, record_stage
from app.train.device import check_devices
from app.train.monitor import log_file
from app.train.processes import ALONE, Ranks
from app.train.trainer import Trainer

log = logging.getLogger(__name__)


def train(config: Config, run: RunRoot, force: bool, ranks: Ranks = ALONE) -> None:
    """Trains one variant into runs/<name>/<label>; continues an unfinished training, refuses another configuration.

    Where `ranks` are several processes, each of them calls this; the first one writes.

    Raises:
        UserError: the folder holds a training of another configuration, no dataset was prepared, or the device or
            shared memory does not suffice.
    """
    out_dir = run.variant_dir(config.label)
    device = device_of(config, ranks)
    if not ranks.share(ranks.is_first and make_ready(config, run, force)):
        return
    with log_file(out_dir / "log.txt") if ranks.is_first else contextlib.nullcontext():
        trainer = Trainer(overrides=ultralytics_args(config, run, device), ranks=ranks)
        if ranks.is_first:
            write_json(out_dir / "env.json", {**environment(), **facts_of(trainer)})
        log.info("train %s: %s", config.label, headline(trainer))
        trainer.train()
    if not ranks.is_first:
        return
    write_loss_curve(out_dir)
    facts = {"epochs": config.train.epochs, "best_ap": trainer.best_fitness, "config_hash": config_hash(config)}
    record_stage(run, f"train {config.label}", facts)
    write_json(out_dir / "done.json", {**facts, "best_sha256": sha256(trainer.best), "time_utc": utc_now()})


def facts_of(trainer: Trainer) -> dict[str, Any]:
    """What training really uses, for env.json."""
    args, on_gpu = trainer.args, trainer.device.type == "cuda"
    return {
        "device": str(trainer.device), "processes": trainer.ranks.n, "workers": args.workers, "seed": args.seed,
        "deterministic": args.deterministic, "amp_requested": trainer.config.train.amp,
        "amp": trainer.config.train.amp and on_gpu, "torch_threads": torch.get_num_threads(),
    }  # fmt: skip


def headline(trainer: Trainer) -> str:
    """One line: what is trained on what, how and where."""
    t, n, device = trainer.config.train, trainer.ranks.n, trainer.device
    precision = "FP16 autocast" if t.amp and device.type == "cuda" else "float32"
    return (
        f"{Path(trainer.config.model).stem} from random weights, "
        f"{trainer.provenance['splits']['train']['n_images']:,} images of {trainer.provenance['title']}, "
        f"{t.epochs} epochs, batch {t.batch}, {t.imgsz} px, {precision}, "
        + (f"{n} processes, {device.type}" if n > 1 else str(device))
    )


def make_ready(config: Config, run: RunRoot, force: bool) -> bool:
    """Makes the variant's folder; False where its training is done already."""
    out_dir = run.variant_dir(config.label)
    if force and out_dir.exists():
        shutil.rmtree(out_dir)
    check_snapshot(config, out_dir / "config.yaml")
    done_json = out_dir / "done.json"
    if done_json.exists():
        done = read_json(done_json, "train")
        log.info("train %s: done already (%d epochs, best AP %.3f)", config.label, done["epochs"], done["best_ap"])
        return False
    read_json(run.provenance, "data")
    # Ultralytics does, in every process at once, when a trainer is made (engine/trainer.py __init__, 8.4.190).
    (out_dir / "results.csv").unlink(missing_ok=True)
    write_text(out_dir / "config.yaml", dump(config))
    return True


def device_of(config: Config, ranks: Ranks) -> str:
    """This process's device: the entry of train.device with its number on this machine; a CPU is shared.

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
    """Compares with the configuration that a folder was trained with, as far as training depends on it; what ended
    before its first checkpoint was not trained."""
    if not snapshot.exists() or not any((snapshot.parent / "weights").glob("last*.pt")):
        return
    if differences := difference(validate(read_yaml(snapshot)), config, ignore=(*MACHINE_KEYS, *LATER_STAGES)):
        raise UserError(
            f"{snapshot.parent} was trained with another configuration ({shown(differences)}): take another RUN=name, "
            "or start over with ARGS=--force"
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
