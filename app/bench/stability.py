"""Does the evaluated model stay as healthy as the trained one? Small trainings that differ in one ingredient each.

Every arm is the product's own train stage in a process of its own; several share a GPU, and all GPUs are used. A call
ends when all are done or its time is up, and the next call of the same command goes on where it stopped. On another
machine `--with` gives it the rows of earlier calls: trainings that these hold to the end are not made again.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.bench.stability_figure import draw
from app.bench.stability_measures import draw_shares, show_falls, show_measures, show_pairs
from app.bench.stability_rows import BASE, LOW_RATE, Row, all_up_to, merge, read_arm, read_file, recipe, write_file
from app.bench.stability_table import show
from app.bench.train import train_command, visible_gpus
from app.core.config import Config, UserError, load
from app.core.curves import save_png
from app.core.labels import FP16
from app.core.results import AP_FREQUENT
from app.core.run import RunRoot
from app.core.scheme import SCHEME, is_file
from app.data.prepare import prepare
from app.train.done import teacher_path
from app.train.interrupt import Interrupt

log = logging.getLogger(__name__)
WARM, EARLIER = "quant.warmup_share=0.67", "quant.scheme=w4a16-decoupled"
BRANCH = "float warm-up"
DISTILLED = ", distilled"  # end of the names of the arms that learn from fp16 of the same seed
IN_FLOAT = "quant.warmup_bits=float"
FLOAT = [WARM, IN_FLOAT]
LOW = "hyp.lrf=0.01"
# Arm -> settings beside the variant's. No arm leaves out EMA or re-estimation, because every arm scores all three
# states. The arms named after BRANCH begin with the weights that fp16 of the same seed has after the warm-up: so they
# show what an option changes without the difference between two trainings, and w8a16 shows how much noise is left. The
# arms named after LOW_RATE end with a tenth of the learning rate, and are compared with the FP16 that does.
ARMS: dict[str, list[str]] = {
    BASE: [],
    "w4a16": [],
    "w4a16-full": ["quant.scheme=w4a16-full"],
    "w4a16-mixed": ["quant.scheme=w4a16-mixed"],
    "w4a16-mixed-dw": ["quant.scheme=w4a16-mixed-dw"],
    "earlier recipe": [EARLIER, "quant.averaged_scales=false"],
    "earlier recipe, scales averaged": [EARLIER],
    "8-bit warm-up": [WARM],
    "8-bit warm-up, mixed": [WARM, "quant.scheme=w4a16-mixed"],
    BRANCH: FLOAT,
    f"{BRANCH}, mixed": [*FLOAT, "quant.scheme=w4a16-mixed"],
    f"{BRANCH}, w8a16": [*FLOAT, "quant.scheme=w8a16"],
    f"{BRANCH}, DFL not exempt": [*FLOAT, "quant.scheme=w4a16-dfl"],
    f"{BRANCH}, per tensor": [*FLOAT, "quant.scheme=w4a16-per-tensor"],
    f"{BRANCH}, learned scale": [*FLOAT, "quant.learned_scale=true"],
    f"{BRANCH}, dampening": [*FLOAT, "quant.dampening=1e-3"],
    f"{BRANCH}, freezing": [*FLOAT, "quant.freeze_threshold=0.02"],
    f"{BRANCH}, correction": [*FLOAT, "quant.correction_epochs=1"],
    f"{BRANCH} for a third": ["quant.warmup_share=0.3334", IN_FLOAT],
    f"{BRANCH} for a half": ["quant.warmup_share=0.5", IN_FLOAT],
    f"w4a16{DISTILLED}": ["quant.distill=1.0"],
    f"{BASE}{LOW_RATE}": [LOW],
    f"w4a16{LOW_RATE}": [LOW],
    f"w4a16-mixed-dw{LOW_RATE}": [LOW, "quant.scheme=w4a16-mixed-dw"],
}
DEFAULT_SEEDS = [0, 1]
IN_FOLDER_NAMES = str.maketrans(" /", "__")
POLL_S = 0.5  # between two looks at the running trainings
GRACE_S = 30.0  # for saving when the time is up


@dataclass(frozen=True)
class Plan:
    """What a call does.

    Attributes:
        arms: names of ARMS, and scheme files: each is an arm of its own.
        seeds: None: DEFAULT_SEEDS are trained, and all of `files` are shown.
        for_s: seconds until the call saves and returns; 0 trains nothing and needs no data.
        n_jobs: trainings at a time.
        until: the epoch up to which trainings are shown; None: each training's last.
        files: of other calls, whose rows join the table.
    """

    arms: list[str]
    seeds: list[int] | None
    for_s: float
    n_jobs: int
    until: int | None = None
    files: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False)
class Training:
    """An arm with a seed: its run root, its configuration, and the --set that this comes from."""

    arm: str
    seed: int
    root: RunRoot
    config: Config
    sets: list[str]

    @property
    def out_dir(self) -> Path:
        return self.root.variant_dir(self.config.label)

    @property
    def is_done(self) -> bool:
        return self.root.done(self.config.label).exists()

    @property
    def can_start(self) -> bool:
        """Whether the checkpoint that it begins with is there, or its teacher has been trained."""
        teacher = teacher_path(self.config, self.root.root)
        needed = teacher.parents[1] / "done.json" if teacher else self.config.warmup_from
        return needed is None or needed.exists()


@dataclass(frozen=True)
class Running:
    """A training, its process, and the GPU that the process sees (an index, or empty)."""

    training: Training
    process: subprocess.Popen[bytes]
    gpu: str


def bench_stability(run: RunRoot, overlays: list[Path], sets: list[str], plan: Plan) -> None:
    """Trains all arms, prints their table and draws their curves.

    Every arm and seed has a run root beside run.root, which holds bench-stability.json and .png.

    Raises:
        UserError: an unknown arm, one that needs another's weights, or files of other trainings than these.
    """
    check_arms(plan.arms)
    trainings = []
    for seed in DEFAULT_SEEDS if plan.seeds is None else plan.seeds:
        for arm in plan.arms:
            trainings.append(training_of(run, arm, seed, overlays, sets))
    arms = ARMS | {arm: settings_of(arm) for arm in plan.arms}
    common = recipe(load("qat", overlays, sets), arms)
    others = []
    for path in plan.files:
        others += read_file(path, common)
    if plan.for_s:
        missing = to_train(trainings, others)
        for training in missing:
            prepare(training.config, training.root, force=False)
        train_all(missing, overlays, plan)
    rows = merge(rows_of(trainings) + others, list(arms))
    write_file(run.root / "bench-stability.json", common, rows)
    visible = chosen(rows, plan)
    if not visible:
        log.info("nothing to show yet: no such training has been validated")
        return
    log.info("%s", of_recipe(common))
    show(visible)
    show_measures(visible)
    show_pairs(visible)
    show_falls(visible, trainings[0].config.report.min_share_of_best)
    save_png(draw(visible), run.root / "bench-stability.png")
    log.info("curves of raw, EMA and EMA + BN: %s", run.root / "bench-stability.png")
    shares = draw_shares(visible)
    if shares:
        save_png(shares, run.root / "bench-stability-shares.png")
        log.info("a dot for every seed: %s", run.root / "bench-stability-shares.png")


def of_recipe(common: dict[str, Any]) -> str:
    """What tells the tables of two recipes apart, in one line."""
    config = common["config"]
    return (
        f"{config['model']}, {config['train.imgsz']} px, {config['train.epochs']} epochs, "
        f"batch {config['train.batch']}, lr0 {config['hyp.lr0']:g}, lrf {config['hyp.lrf']:g}"
    )


def check_arms(arms: list[str]) -> None:
    """Raises UserError for an unknown arm, and for one that needs the weights of BASE where BASE is not named."""
    for arm in arms:
        if arm not in ARMS and not is_file(arm):
            raise UserError(f"--arms {arm}: choose among {', '.join(ARMS)}, or name a scheme file such as my.yaml")
    for arm in arms:
        if (branches(arm) or arm.endswith(DISTILLED)) and BASE not in arms:
            verb = "begins with" if branches(arm) else "is distilled from"
            raise UserError(f"--arms {arm}: it {verb} the weights of {BASE}, name that arm too")


def settings_of(arm: str) -> list[str]:
    """What an arm sets beside the variant's: as in ARMS, or its scheme file."""
    return ARMS.get(arm, [f"{SCHEME}={arm}"])


def training_of(run: RunRoot, arm: str, seed: int, overlays: list[Path], sets: list[str]) -> Training:
    """The training of an arm with a seed; that of BASE keeps the checkpoint that the arms after BRANCH begin with."""
    own = [*sets, *settings_of(arm), f"train.seed={seed}"]
    variant = "fp16" if arm.startswith(BASE) else "qat"
    if arm == BASE:
        switches = [load("qat", overlays, [*own, *ARMS[it]]).n_quant_warmup_epochs for it in ARMS if branches(it)]
        own.append(f"train.save_period={math.gcd(*switches)}")
    if branches(arm):
        n_warm = load("qat", overlays, own).n_quant_warmup_epochs
        kept = root_of(run, BASE, seed).variant_dir("fp16") / "weights" / f"epoch{n_warm}.pt"
        own.append(f"quant.warmup_from={kept}")
    if arm.endswith(DISTILLED):
        own.append(f"quant.teacher={root_of(run, BASE, seed).best(FP16)}")
    return Training(arm, seed, root_of(run, arm, seed), load(variant, overlays, own), own)


def branches(arm: str) -> bool:
    """Whether an arm begins with weights that BASE keeps."""
    return arm.startswith(BRANCH)


def root_of(run: RunRoot, arm: str, seed: int) -> RunRoot:
    """Run root of one training; the cache of views is shared."""
    return RunRoot(run.runs_dir, f"{run.name}-{arm.replace(',', '').translate(IN_FOLDER_NAMES)}-{seed}")


def to_train(trainings: list[Training], rows: list[Row]) -> list[Training]:
    """Those that no row holds to the end, and BASE of a seed whose checkpoint one of these begins with."""
    missing = [training for training in trainings if not is_among(training, rows)]
    waiting = {training.seed for training in missing if not (training.is_done or training.can_start)}
    return [it for it in trainings if it in missing or (it.arm == BASE and it.seed in waiting)]


def is_among(training: Training, rows: list[Row]) -> bool:
    """Whether a row holds this training to its end, with all that a row holds today."""
    quant = training.config.quant
    for row in rows:
        is_same = (row["arm"], row["seed"]) == (training.arm, training.seed)
        is_whole = AP_FREQUENT in row and row["epoch"][-1] == training.config.train.epochs
        is_corrected = row["corrected"] is not None or quant is None or not quant.correction_epochs
        if is_same and is_whole and is_corrected:
            return True
    return False


def rows_of(trainings: list[Training]) -> list[Row]:
    """The rows of those that have been validated."""
    rows = []
    for training in trainings:
        row = read_arm(training.arm, training.seed, training.config, training.out_dir)
        if row is not None:
            rows.append(row)
    return rows


def chosen(rows: list[Row], plan: Plan) -> list[Row]:
    """The rows of the plan's arms and seeds, up to its epoch."""
    wanted = [row for row in rows if row["arm"] in plan.arms and (plan.seeds is None or row["seed"] in plan.seeds)]
    return wanted if plan.until is None else all_up_to(wanted, plan.until)


def train_all(trainings: list[Training], overlays: list[Path], plan: Plan) -> None:
    """Runs the train stage of every training that is not done, n_jobs at a time, until the time is up.

    Raises:
        Interrupted: a signal came; the trainings have saved everything and ended.
    """
    deadline = time.monotonic() + plan.for_s
    waiting = [training for training in trainings if not training.is_done]
    running: list[Running] = []
    with Interrupt("every weights/last.pt", "the trainings have saved") as interrupt:
        while (waiting or running) and not interrupt.signal and time.monotonic() < deadline:
            ready = [training for training in waiting if training.can_start]
            for training in ready[: plan.n_jobs - len(running)]:
                waiting.remove(training)
                gpu = freest_gpu(running)
                running.append(Running(training, start(training, overlays, gpu), gpu))
            if not running:
                explain_waiting(waiting)
                break
            time.sleep(POLL_S)
            running = still_running(running)
        for one in running:
            one.process.send_signal(signal.SIGTERM)
        for one in running:
            one.process.wait(GRACE_S)
    if waiting or running:
        log.info("%d trainings are not done: the same command goes on", len(waiting) + len(running))
    interrupt.leave()


def explain_waiting(waiting: list[Training]) -> None:
    """Logs why none of these can start."""
    for it in waiting:
        log.warning(
            "%s, seed %d, cannot begin without %s: %s of this seed failed, or ended before it was to keep that "
            "checkpoint and has to be made again without its folder",
            it.arm, it.seed, teacher_path(it.config, it.root.root) or it.config.warmup_from, BASE,
        )  # fmt: skip


def still_running(running: list[Running]) -> list[Running]:
    """Those whose process has not ended; logs how the others ended."""
    left = []
    for one in running:
        code = one.process.poll()
        if code is None:
            left.append(one)
        else:
            how = "done" if code == 0 else f"ended with exit code {code}"
            log.info("%s, seed %d: %s", one.training.arm, one.training.seed, how)
    return left


def freest_gpu(running: list[Running]) -> str:
    """The visible GPU with the fewest trainings."""
    taken = [one.gpu for one in running]
    return min(visible_gpus(), key=taken.count)


def start(training: Training, overlays: list[Path], gpu: str) -> subprocess.Popen[bytes]:
    """Starts the train stage of one training in a process that sees one GPU; its output goes to bench.log."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpu}
    command = train_command(training.root, training.config.variant, overlays, training.sets)
    with open(training.root.root / "bench.log", "ab") as output:
        # A session of its own: a terminal's Ctrl-C reaches it as our SIGTERM alone, a second signal would not save.
        return subprocess.Popen(command, stdout=output, stderr=output, env=environ, start_new_session=True)
