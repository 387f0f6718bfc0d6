"""What a training shows while it runs: progress line, epoch line, log file, results.csv, TensorBoard, loss curve."""

from __future__ import annotations

import contextlib
import logging
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tensorboard.plugins.hparams import summary_v2 as hparams
from torch.utils.tensorboard import SummaryWriter
from ultralytics.utils import LOGGER, ops
from ultralytics.utils.plotting import plot_images

from app.core.config import Config, dump
from app.core.curves import curve_figure
from app.core.differences import flatten
from app.core.progress import LOSS, MEMORY, Meter, Printable, Segment, clock
from app.core.results import STATES, WARM_UP, Row, Rows, is_validated, train_loss, write_rows
from app.train.done import After

N_PICTURES = 20  # prediction pictures and loss figures a run, spread over its epochs, to keep event files small
HPARAM_SECTIONS = ("variant", "model", "data", "train", "hyp", "quant")
SCHEME = "quant.scheme"
# Columns of results.csv whose numbers are another column's: AP/ema_bn, AP50/ema_bn, and lr/pg0 (after the warm-up).
TWINS = ("metrics/mAP50-95(B)", "metrics/mAP50(B)", "lr/pg1", "lr/pg2")
TOTAL_TRAIN_LOSS = "train_loss/total"
QAT_EPOCH = 1.03  # epochs of FP16 that one of QAT takes: 384 against 372 images/s, docs/results.md
ABOUT_AP = (
    "raw and EMA may stay near AP 0 for many epochs, which is normal: their running BatchNorm statistics lag behind "
    "the weights; EMA+BN, with the statistics re-estimated on train images, is what is scored and kept"
)
log = logging.getLogger(__name__)


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Sends every log record of this process to `path` as well, Ultralytics' own included.

    Of Ultralytics' records only warnings reach the terminal.
    """
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(Printable("%(asctime)s %(name)s %(levelname)s %(message)s"))
    LOGGER.handlers.clear()
    LOGGER.propagate = True
    LOGGER.setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


class Monitor:
    """Collects the facts of an epoch and shows them.

    Args:
        out_dir: folder of the variant.
        config: its configuration; `label` is the first word of every line.
        after: what the job has to do after this training; None: it is no job, or not known.
        writes: False on all ranks but rank 0, which count and write nothing.
    """

    writer: SummaryWriter  # of the process that writes

    def __init__(self, out_dir: Path, config: Config, after: After | None = None, writes: bool = True) -> None:
        self.out_dir, self.label, self.after = out_dir, config.label, after
        if writes:
            self.writer = SummaryWriter(str(out_dir / "tensorboard"), flush_secs=10)
            self.writer.add_text("config", f"```yaml\n{dump(config)}\n```")
            self._add_hparams(config)
        self.run_start = time.monotonic()
        self.epochs_here = 0.0  # trained by this process; the first may have begun in the middle
        self.scoring_s = 0.0  # of one state, in the last validation

    def _add_hparams(self, config: Config) -> None:
        """Into the events of the scalars; SummaryWriter.add_hparams would make a folder, thus a run, of its own.

        Without a list of columns (hparams_config_pb) TensorBoard makes one of all runs, those first in which runs
        differ. FP16 has no settings of quant but a scheme, `none`.
        """
        values: dict[str, Any] = {SCHEME: "none"}
        for key, value in flatten(config).items():
            if key.split(".")[0] in HPARAM_SECTIONS and key != "quant":
                values[key] = value if isinstance(value, bool | int | float) else str(value)
        writer: Any = self.writer.file_writer
        writer.add_summary(hparams.hparams_pb(values, trial_id=f"{self.out_dir.parent.name}/{self.label}"))

    def start_epoch(self, epoch: int, n_epochs: int, n_images: int, n_trained: int, before_s: float = 0.0) -> None:
        """`epoch` counts from 0; of its n_images, n_trained were trained before, by a process that was stopped.

        Those took before_s seconds, or a time that is not known, 0.0.
        """
        self.epoch, self.n_epochs = epoch, n_epochs
        self.before_s, self.timed_before = before_s, min(n_trained, n_images) if before_s else 0
        n_left = max(n_images - n_trained, 0)  # the last batch may be smaller than the others
        self.share_here = n_left / n_images
        self.epoch_start = self.saved = time.monotonic()
        number = f"{epoch + 1}/{n_epochs}"
        self.meter = Meter(f"{self.label} epoch {number}", n_left, short=f"{self.label} {number}")

    def step(self, n_images: int, losses: Callable[[], dict[str, float]]) -> None:
        """`losses` gives the running means of the epoch; it is called only when a line is shown."""

        def notes() -> list[Segment]:
            left = f"{self.whole} {clock(self._left_s(self.n_epochs - self.epoch - 1, self._epoch_left_s()))}"
            loss = f"loss {sum(losses().values()):.3f}"
            return [Segment(left), Segment(f"{memory_gib():.1f} GiB", MEMORY), Segment(loss, LOSS)]

        self.meter.update(n_images, notes)

    @property
    def whole(self) -> str:
        """What the time left is of."""
        return "training" if self.after is None else "job"

    def _epoch_left_s(self) -> float:
        """Without the validation."""
        return self.meter.seconds / self.meter.done * (self.meter.total - self.meter.done)

    def _left_s(self, n_epochs: int, epoch_left_s: float = 0.0) -> float:
        """Seconds until the job ends, or this training, where no job is known; of it, n_epochs are to begin yet.

        An epoch takes the mean of those so far; during the first, what its rate says, which knows nothing of validation
        yet. A QAT training that follows takes QAT_EPOCH times that an epoch. A file takes as long to score as a state
        of the network in the last validation. What ptq, export and report take is left out.
        """
        if self.epochs_here:
            epoch_s = (self.epoch_start - self.run_start) / self.epochs_here
        else:
            epoch_s = self.meter.seconds / self.meter.done * self.meter.total / self.share_here
        after = self.after or After()
        after_s = after.qat_epochs * QAT_EPOCH * epoch_s + after.files * self.scoring_s
        return epoch_left_s + n_epochs * epoch_s + after_s

    def save_due(self, every_s: float, ahead_s: float = 0.0) -> bool:
        """Whether so many seconds have passed since the epoch's start or since this was last true.

        Args:
            ahead_s: how long it takes until this can be asked again.
        """
        due = time.monotonic() + ahead_s - self.saved >= every_s
        self.saved = time.monotonic() if due else self.saved
        return due

    def validation_s(self, n_images: int) -> float:
        """Seconds that the next validation takes: as many as the last one took.

        Before the first one of this process they are those in which it trains as many images in each state, which
        takes longer. They are 0 where it has trained nothing: then the checkpoint that it began from is of this place.
        """
        if self.scoring_s or not self.meter.done:
            return self.scoring_s * len(STATES)
        return self.meter.seconds / self.meter.done * n_images * len(STATES)

    @property
    def trained_s(self) -> float:
        """Seconds that the epoch's steps have taken so far, in all processes."""
        return self.before_s + self.meter.seconds

    def end_train_pass(self) -> None:
        self.meter.close()
        self.train_s, self.train_end = self.trained_s, time.monotonic()

    def epoch_facts(self) -> dict[str, float]:
        """Seconds and images/s of the epoch so far, validation included in time/epoch_s.

        They are those of all processes that have trained it, but for what a killed one did after its last checkpoint.
        """
        return {
            "time/train_s": round(self.train_s, 3),
            "time/epoch_s": round(self.before_s + time.monotonic() - self.epoch_start, 3),
            "time/images_per_s": round((self.timed_before + self.meter.done) / self.train_s, 2),
        }

    def end_epoch(self, rows: Rows, validator: Any, best_ap: float | None, best_epoch: int) -> None:
        """Writes results.csv and TensorBoard, and logs one line.

        Args:
            rows: all epochs so far.
            validator: Ultralytics', after the validation of this epoch.
            best_ap, best_epoch: of best.pt; None and 0 where there is none yet.
        """
        row = rows[-1]
        write_rows(self.out_dir / "results.csv", rows)
        n_done = self.epoch + 1
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, n_done)
        if is_validated(row):
            self.scoring_s = (time.monotonic() - self.train_end) / len(STATES)
            self._add_pictures(rows, validator, n_done)
        self.epochs_here += self.share_here
        self.epoch_start = time.monotonic()
        left = clock(self._left_s(self.n_epochs - n_done)) if self.epochs_here else "?"
        aps = "no AP"
        if is_validated(row):
            aps = "AP raw {AP/raw:.3f}, EMA {AP/ema:.3f}, EMA+BN {AP/ema_bn:.3f}".format(**row)
        best = "" if best_ap is None else f" (best {best_ap:.3f} at {best_epoch})"
        best += ", quant warm-up" if row.get(WARM_UP) else ""
        log.info(
            "%s epoch %d/%d: loss %.3f, %s%s, %.0f images/s, %s left for the %s",
            self.label, n_done, self.n_epochs, train_loss(row), aps, best, row["time/images_per_s"], left, self.whole,
        )  # fmt: skip
        if is_validated(row) and not any(map(is_validated, rows[:-1])):
            log.info("%s", ABOUT_AP)

    def _add_pictures(self, rows: Rows, validator: Any, n_done: int) -> None:
        """The same val batch every time, its ground truth once, and the curves so far; N_PICTURES times in all.

        Earlier processes of a resumed training have drawn too: the rows say when.
        """
        validated = [row for row in rows[:-1] if is_validated(row)]
        if validated and self._period(n_done) == self._period(validated[-1]["epoch"]) and n_done < self.n_epochs:
            return
        if not validated:
            self.writer.add_image("val/labels", draw_batch(validator, validator.first_batch[1]), 0, dataformats="HWC")
        self.writer.add_image("val/predictions", draw_predictions(validator), n_done, dataformats="HWC")
        self.writer.add_figure("loss_curve", curve_figure(rows), n_done)

    def _period(self, n_done: float) -> int:
        """Number of the part of the training, one of N_PICTURES, in which an epoch lies."""
        n_epochs = max(self.n_epochs // N_PICTURES, 1)
        return max(int(n_done) // n_epochs, 1)

    def close(self) -> None:
        self.writer.close()


def scalars(row: Row) -> Row:
    """What TensorBoard shows of an epoch: the columns of results.csv, each curve once, and the total train loss."""
    shown = {name: value for name, value in row.items() if name != "epoch" and name not in TWINS}
    return {**shown, TOTAL_TRAIN_LOSS: train_loss(row)}


def memory_gib() -> float:
    """Peak of what PyTorch has reserved on the GPU; without one, of this process's resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def draw_predictions(validator: Any) -> Any:
    """First validation batch with the detections of the scored model: uint8 [H,W,3]."""
    preds, _ = validator.first_batch
    labels = {key: torch.cat([pred[key] for pred in preds]) for key in ("cls", "conf", "bboxes")}
    counts = torch.tensor([len(pred["conf"]) for pred in preds])
    labels["batch_idx"] = torch.arange(len(preds)).repeat_interleave(counts)
    labels["bboxes"] = ops.xyxy2xywh(labels["bboxes"])
    return draw_batch(validator, labels)


def draw_batch(validator: Any, labels: dict[str, Any]) -> Any:
    """The images of the first validation batch with the boxes of `labels`."""
    _, batch = validator.first_batch
    boxes = {key: labels[key] for key in ("batch_idx", "cls", "bboxes", "conf") if key in labels}
    options: dict[str, Any] = {"max_size": 1280, "save": False, "threaded": False}  # `threaded` is its decorator's
    return plot_images(boxes, batch["img"], batch["im_file"], names=validator.names, **options)
