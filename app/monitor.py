"""What a training shows while it runs: progress line, epoch line, log file, results.csv, TensorBoard, loss curve."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from ultralytics.utils import LOGGER, ops
from ultralytics.utils.plotting import plot_images

from app.curves import curve_figure, train_loss, write_rows
from app.progress import Meter, clock

N_PICTURES = 20  # prediction pictures and loss figures a run, spread over its epochs, to keep event files small
log = logging.getLogger(__name__)


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Sends every log record of this process to `path` as well, Ultralytics' own included; only its warnings and ours
    reach the terminal."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
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
        label: its name, first word of every line.
    """

    def __init__(self, out_dir: Path, label: str) -> None:
        self.out_dir, self.label = out_dir, label
        self.writer = SummaryWriter(str(out_dir / "tensorboard"), flush_secs=10)
        self.writer.add_text("config", f"```yaml\n{(out_dir / 'config.yaml').read_text(encoding='utf-8')}\n```")
        self.run_start = time.monotonic()
        self.n_epochs_here = self.n_pictures = 0

    def start_epoch(self, epoch: int, n_epochs: int, n_images: int) -> None:
        """`epoch` counts from 0; n_images are still to be trained in it."""
        self.epoch, self.n_epochs = epoch, n_epochs
        self.epoch_start = self.saved = time.monotonic()
        self.meter = Meter(f"{self.label} epoch {epoch + 1}/{n_epochs}", n_images)

    def step(self, n_images: int, losses: Callable[[], dict[str, float]], memory_gib: float) -> None:
        """`losses` gives the running means of the epoch; it is called only when a line is shown."""
        self.meter.update(n_images, lambda: f"loss {sum(losses().values()):.3f}, {memory_gib:.1f} GiB")

    def save_due(self, every_s: float) -> bool:
        """Whether so many seconds have passed since the epoch's start or since this was last true."""
        due = time.monotonic() - self.saved >= every_s
        self.saved = time.monotonic() if due else self.saved
        return due

    def end_train_pass(self) -> None:
        self.meter.close()
        self.train_s = self.meter.seconds

    def epoch_facts(self) -> dict[str, float]:
        """Seconds and images/s of the epoch so far, validation included in time/epoch_s."""
        return {
            "time/train_s": round(self.train_s, 3),
            "time/epoch_s": round(time.monotonic() - self.epoch_start, 3),
            "time/images_per_s": round(self.meter.done / self.train_s, 2),
        }

    def end_epoch(self, rows: list[dict[str, float]], validator: Any, best: tuple[float, int]) -> None:
        """Writes results.csv and TensorBoard, and logs one line. `rows` are all epochs so far."""
        row = rows[-1]
        write_rows(self.out_dir / "results.csv", rows)
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, self.epoch + 1)
        n_done, validated = self.epoch + 1, "AP/ema_bn" in row
        if validated and (n_done // max(self.n_epochs // N_PICTURES, 1) > self.n_pictures or n_done == self.n_epochs):
            self.n_pictures = n_done // max(self.n_epochs // N_PICTURES, 1)
            self.writer.add_image("val/predictions", draw_predictions(validator), n_done, dataformats="HWC")
            self.writer.add_figure("loss_curve", curve_figure(rows), n_done)
        self.n_epochs_here += 1
        left = (time.monotonic() - self.run_start) / self.n_epochs_here * (self.n_epochs - n_done)
        aps = "AP raw {AP/raw:.3f}, EMA {AP/ema:.3f}, EMA+BN {AP/ema_bn:.3f}".format(**row) if validated else "no AP"
        best_text = f" (best {best[0]:.3f} at {best[1]})" if best[1] else ""
        log.info(
            "%s epoch %d/%d: loss %.3f, %s%s, %.0f images/s, %s left",
            self.label, n_done, self.n_epochs, train_loss(row), aps, best_text, row["time/images_per_s"], clock(left),
        )  # fmt: skip

    def close(self) -> None:
        self.writer.close()


def draw_predictions(validator: Any) -> Any:
    """First validation batch with the detections of the scored model: uint8 [H,W,3]."""
    preds, batch = validator.first_batch
    labels = {
        "batch_idx": torch.cat([torch.full_like(p["conf"], i) for i, p in enumerate(preds)]),
        "cls": torch.cat([p["cls"] for p in preds]),
        "conf": torch.cat([p["conf"] for p in preds]),
        "bboxes": ops.xyxy2xywh(torch.cat([p["bboxes"] for p in preds])),
    }
    options: dict[str, Any] = {"max_size": 1280, "save": False, "threaded": False}  # `threaded` is its decorator's
    return plot_images(labels, batch["img"], batch["im_file"], names=validator.names, **options)
