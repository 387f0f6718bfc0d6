"""The train stage: one variant into its folder of the run root; continues what is unfinished."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from app.core.config import Config, UserError
from app.core.curves import write_loss_curve
from app.core.differences import config_hash
from app.core.environment import environment, utc_now
from app.core.files import read_json, sha256, write_json
from app.core.run import RunRoot, record_stage
from app.core.start import told
from app.train.device import check_devices, explain_memory
from app.train.done import TEACHER, After, has_begun, images_now, make_ready
from app.train.loop import Loop
from app.train.monitor import log_file
from app.train.processes import ALONE, Ranks, explain_lost_peer
from app.train.trainer import Trainer

log = logging.getLogger(__name__)


def train(config: Config, run: RunRoot, force: bool, ranks: Ranks = ALONE, after: After | None = None) -> None:
    """Trains one variant into runs/<name>/<label>; continues an unfinished training, refuses another configuration.

    Where `ranks` are several processes, each of them calls this function; rank 0 writes. `after` is what a job has to
    do after this training, if it is known.

    Raises:
        UserError: the folder holds a training of another configuration, no dataset was prepared, the device, its memory
            or shared memory does not suffice, or a loader process died.
        PeerLost: another process of the training has ended or hangs.
    """
    out_dir = run.variant_dir(config.label)
    device = device_of(config, ranks)
    if not ranks.broadcast(ranks.is_main and make_ready(config, run, force)):
        return
    with log_file(out_dir / "log.txt") if ranks.is_main else contextlib.nullcontext(), _explained(config, out_dir):
        trainer = Trainer(config, run, device, ranks)
        if ranks.is_main:
            write_json(out_dir / "env.json", {**environment(), **trainer.facts()})
        log.info("train %s: %s", config.label, trainer.headline())
        loop = Loop(trainer, after)
        loop.run()
    if ranks.is_main:
        finish(loop, run)


@contextlib.contextmanager
def _explained(config: Config, folder: Path) -> Iterator[None]:
    """Says in the user's words why a training cannot be set up or go on, where it is no fault of ours."""
    try:
        yield
    except RuntimeError as error:
        explain_memory(error, config, has_begun(folder))  # NCCL has its errors too: before a lost peer is blamed
        explain_lost_peer(error)
        raise


def finish(loop: Loop, run: RunRoot) -> None:
    """Writes what says that a training is done; done.json is the last of it."""
    config, state = loop.config, loop.state
    write_loss_curve(run.variant_dir(config.label))
    best_ap, best_sha256 = state.best_fitness, sha256(loop.trainer.best)
    start = told(config.train.weights and config.train.weights.facts)
    facts = {"start": start, "epochs": config.train.epochs, "best_ap": best_ap, "config_hash": config_hash(config)}
    if config.quant and config.quant.distill:
        facts["distilled"] = told(read_json(run.variant_dir(config.label) / TEACHER, "train"))
    record_stage(run, f"train {config.label}", facts)
    done = {**facts, "best_sha256": best_sha256, "images": images_now(run), "time_utc": utc_now()}
    write_json(run.done(config.label), done)


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
