"""The sweep stage: trains FP16 and every scheme with every seed, scores them, and ends with one report."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from app.core.child import job_words, run_stage
from app.core.config import Config, load
from app.core.differences import difference
from app.core.environment import hardware, nvidia_smi
from app.core.files import read_json, write_json
from app.core.run import RunRoot
from app.core.scheme import SCHEME
from app.sweep.lanes import run_lanes
from app.sweep.plan import Lane, Order, lanes_of, sweep_facts, sweep_path
from app.sweep.price import ESTIMATE_SHAPE, listing

ON_ONE_GPU = "train.device=0"  # the estimate of a training that has a GPU for itself
log = logging.getLogger(__name__)


def sweep(order: Order, run: RunRoot) -> None:
    """Makes what is missing of runs/<name>-seed<N>, and the report of all; runs/<name> has the lines of the stages.

    Raises:
        UserError: a mistake in the order, or one that a stage met.
        Interrupted: a signal came; all have saved.
        SystemExit: (1) a training or stage failed, the report has the others; else the code of the report stage.
    """
    lanes = lanes_of(order, run)
    check_schemes(lanes)
    write_json(sweep_path(run), sweep_facts(lanes, run))
    for lane in lanes:
        if lane.force:  # the data stage then takes other data than before; its own --force replaces what all runs share
            lane.run.provenance.unlink(missing_ok=True)
    gpus = places(lanes[0].trainings[0].config)
    log.info("sweep: %s", headline(lanes, gpus))
    failed = run_lanes(lanes, gpus, run.root)
    words = job_words(run.name, run.runs_dir, order.overlays, order.sets)
    code = run_stage("report", words)
    if failed:
        log.error("failed: %s; the same command tries them again", "; ".join(failed))
    if code or failed:
        sys.exit(1 if failed else code)


def dry_run(order: Order, run: RunRoot) -> None:
    """Lists what the sweep would do, with the hours of an estimate, which is made if none has these settings.

    Raises:
        UserError: as `sweep`.
        SystemExit: the estimate failed.
    """
    lanes = lanes_of(order, run)
    gpus = places(lanes[0].trainings[0].config)
    sets = [*order.sets, f"{SCHEME}={order.schemes[0]}", *([ON_ONE_GPU] if len(gpus) > 1 else [])]
    path = run.root / "estimate.json"
    if not is_estimate_of(load("qat", order.overlays, sets, lanes[0].run.root), run):
        log.info("sweep: no estimate of these settings on this machine in %s, it is made first", path)
        if code := run_stage("estimate", job_words(run.name, run.runs_dir, order.overlays, sets)):
            sys.exit(code)
    hours = read_json(path, "estimate", ESTIMATE_SHAPE)["hours"]
    for line in listing(lanes, hours, gpus):
        log.info("%s", line)


def is_estimate_of(config: Config, run: RunRoot) -> bool:
    """Whether the estimate of this name is one of these settings and this machine; seed and scheme cost nothing.

    A machine is known by its GPUs and processors: containers have other names each time.
    """
    path = run.root / "estimate.json"
    if not path.exists():
        return False
    facts = read_json(path, "estimate", {"config": dict[str, Any], "environment": dict[str, Any]})
    is_here = all(facts["environment"].get(key) == value for key, value in hardware().items())
    return is_here and not difference(facts["config"], config, ignore=("train.seed", SCHEME))


def places(config: Config) -> list[str | None]:
    """Where trainings run at the same time: a GPU each. None: one after the other, on what train.device says."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = nvidia_smi(("index",)) if given is None else list(filter(None, given.split(",")))
    several = len(gpus) > 1 and config.train.device == "auto"
    return list(gpus) if several else [None]


def check_schemes(lanes: list[Lane]) -> None:
    """A scheme that does not fit the network is refused before hours of training.

    Raises:
        UserError: names the pattern.
    """
    waiting = [training.config for training in lanes[0].trainings[1:] if not training.is_done]
    if not waiting:
        return
    log.info("sweep: loading PyTorch to check the schemes")
    from app.core.environment import isolate_libraries
    from app.quant.model import check_scheme

    isolate_libraries(lanes[0].run.cache_dir)
    for config in waiting:
        check_scheme(config)


def headline(lanes: list[Lane], gpus: list[str | None]) -> str:
    """'3 schemes, 2 seeds: 8 trainings, 5 done; one after the other'."""
    trainings = [training for lane in lanes for training in lane.trainings]
    n_done = sum(training.is_done for training in trainings)
    at_once = min(len(gpus), len(lanes))
    how = f"{at_once} of {len(gpus)} GPUs, one for each seed" if len(gpus) > 1 else "one after the other"
    counts = f"{len(lanes[0].ptq)} schemes, {len(lanes)} seeds: {len(trainings)} trainings, {n_done} done"
    return f"{counts}; {how}"
