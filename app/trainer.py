"""The trainer: one subclass of Ultralytics' DetectionTrainer for both variants."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from ultralytics.data.build import build_dataloader
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.torch_utils import ModelEMA, autocast, init_seeds, unwrap_model

from app.config import read_yaml, validate
from app.model import build, load_checkpoint, save_checkpoint, scored_state
from app.monitor import Monitor
from app.quant.stabilise import reestimate_batchnorm
from app.run import read_json, write_json
from app.view import read_split

log = logging.getLogger(__name__)
# The three validated states, in the order they are scored. The last one picks best.pt and is exported.
STATES = ("raw", "ema", "ema_bn")
# Scores recorded for every state: our name -> key of Ultralytics' validator.
SCORES = {"AP": "metrics/mAP50-95(B)", "AP50": "metrics/mAP50(B)"}
LOSSES = ("val/box_loss", "val/cls_loss", "val/dfl_loss")


class CocoDataset(YOLODataset):
    """YOLODataset whose labels come from the checked view.

    Ultralytics' own scan would pickle a cache beside the labels, drop images silently and rewrite JPEGs in place
    (ultralytics/data/utils.py check_image, 8.4.190).
    """

    def __init__(self, *args: Any, provenance: dict[str, Any], split: str, **kwargs: Any) -> None:
        self._view = (provenance, split)
        super().__init__(*args, **kwargs)

    def get_labels(self) -> list[dict[str, Any]]:
        """One dict an image in the layout of BaseDataset.get_labels; boxes are xywh, normalised."""
        images = read_split(*self._view)
        self.im_files = [image.path for image in images]
        return [
            {
                "im_file": image.path, "shape": image.shape_hw, "segments": [], "keypoints": None,
                "cls": image.labels[:, :1], "bboxes": image.labels[:, 1:], "normalized": True, "bbox_format": "xywh",
            }
            for image in images
        ]  # fmt: skip


class Validator(DetectionValidator):
    """Scores the model that the trainer holds out, and keeps the first batch for TensorBoard."""

    def get_model(self, model: Any, trainer: Any = None) -> Any:
        return trainer.held_out

    def update_metrics(self, preds: list[dict[str, torch.Tensor]], batch: dict[str, Any]) -> None:
        if self.batch_i == 0:
            self.first_batch = (preds, batch)
        super().update_metrics(preds, batch)


class Trainer(DetectionTrainer):
    """Both variants. Differs from Ultralytics' trainer in the network it builds, the data it reads without scanning,
    the three states it validates, and checkpoints that are plain state_dicts and resume at the next epoch.

    The configuration comes from save_dir/config.yaml, so that a process that only knows `overrides` can build it.
    """

    # Ultralytics starts these as None or as a file name; from _setup_train on they are:
    model: Any
    ema: ModelEMA
    validator: Any
    held_out: Any
    loss: torch.Tensor
    tloss: dict[str, torch.Tensor]
    train_loader: Any
    scaler: Any
    optimizer: Any
    amp: Any
    fitness: float

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        out_dir = Path((overrides or {})["save_dir"])
        self.config = validate(read_yaml(out_dir / "config.yaml"))
        super().__init__(cfg, overrides, _callbacks)
        if self.device.type == "cpu":  # Ultralytics leaves one core idle (select_device: NUM_THREADS), 8.4.190
            torch.set_num_threads(os.cpu_count() or 1)
        self.provenance = read_json(Path(self.args.data).parent / "provenance.json", "data")
        self.rows: list[dict[str, float]] = []
        self.best_epoch = 0
        self.monitor = Monitor(out_dir, self.config.label)
        self.add_callback("on_train_epoch_start", Trainer._start_epoch)
        self.add_callback("on_train_batch_end", Trainer._end_batch)
        self.add_callback("on_train_epoch_end", Trainer._end_train_pass)
        self.add_callback("teardown", lambda trainer: trainer.monitor.close())

    def facts(self) -> dict[str, Any]:
        """What training really used, for env.json."""
        return {
            "device": str(self.device), "seed": self.args.seed, "deterministic": self.args.deterministic,
            "workers": self.args.workers, "amp_requested": self.config.train.amp,
            "amp": bool(self.config.train.amp and self.device.type == "cuda"), "torch_threads": torch.get_num_threads(),
        }  # fmt: skip

    def headline(self) -> str:
        t, splits = self.config.train, self.provenance["splits"]
        precision = "FP16 autocast" if self.facts()["amp"] else "float32"
        return (
            f"{Path(self.config.model).stem} from random weights, {splits['train']['n_images']:,} images of "
            f"{self.provenance['title']}, {t.epochs} epochs, batch {t.batch}, {t.imgsz} px, {precision}, {self.device}"
        )

    # --- what is trained on what -------------------------------------------------------------------------------------

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Quantization happens here, before the optimizer and the EMA copy are made."""
        model, quant_config = build(self.config)
        if quant_config:
            write_json(self.save_dir / "quant_config.json", quant_config)
        return model

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> CocoDataset:
        augment = mode == "train"
        return CocoDataset(
            img_path=img_path, imgsz=self.args.imgsz, batch_size=batch, augment=augment, hyp=self.args,
            rect=not augment, cache=self.args.cache or None, stride=32, pad=0.0 if augment else 0.5, task="detect",
            prefix=f"{mode}: ", data=self.data, provenance=self.provenance, split=mode,
        )  # fmt: skip

    def get_validator(self) -> Validator:
        return Validator(self.test_loader, save_dir=self.save_dir, args=deepcopy(self.args), _callbacks=self.callbacks)

    # --- validation in three states ----------------------------------------------------------------------------------

    def validate(self) -> tuple[dict[str, float], float]:
        """Scores raw weights, their EMA, and the EMA with re-estimated BatchNorm; the last one is the fitness.

        Fitness is AP (mAP50-95) of Ultralytics' validator on the one2one head.
        """
        held_out = self.held_out = deepcopy(self.ema.ema)
        metrics: dict[str, float] = {}
        for state in STATES:
            source = unwrap_model(self.model) if state == "raw" else self.ema.ema
            held_out.load_state_dict(source.state_dict())
            if state == "ema_bn":
                start = time.monotonic()
                reestimate_batchnorm(held_out, self._bn_batches())
                metrics["time/bn_reestimation_s"] = round(time.monotonic() - start, 3)
            scores = self.validator(self)
            metrics |= {f"{name}/{state}": scores[key] for name, key in SCORES.items()}
            metrics[f"val_loss/{state}"] = sum(scores[key] for key in LOSSES)
        scores.pop("fitness")
        self.fitness = scores["metrics/mAP50-95(B)"]
        if self.best_fitness is None or self.fitness > self.best_fitness:
            self.best_fitness, self.best_epoch = self.fitness, self.epoch + 1
        return {**scores, **metrics}, self.fitness

    def _bn_batches(self) -> Iterator[torch.Tensor]:
        """The same train batches at every validation of a mosaic phase: [N,3,H,W], 0..1, on the device."""
        loader = build_dataloader(
            self.train_loader.dataset, batch=self.train_loader.batch_size, workers=self.args.workers, shuffle=True,
            device=self.device,
        )  # fmt: skip
        with autocast(self.amp, device=self.device.type):
            for batch in itertools.islice(loader, self.config.train.bn_batches):
                yield self.preprocess_batch(batch)["img"]
        loader.close()

    # --- epochs as functions of (seed, epoch, state) -----------------------------------------------------------------

    def _start_epoch(self) -> None:
        """Draws data order and augmentation of an epoch from (seed, epoch) alone, whatever ran before it."""
        seed = self.args.seed * 100_003 + self.epoch
        init_seeds(seed, deterministic=self.args.deterministic)
        dataset = self.train_loader.dataset
        if dataset.cache != "ram":  # the mosaic buffer remembers the images of the epoch before
            dataset.buffer.clear()
            dataset.ims = [None] * dataset.ni
        self.train_loader.generator.manual_seed(seed)
        self.train_loader.reset()
        self.monitor.start_epoch(self.epoch, self.epochs, len(dataset))

    def _end_batch(self) -> None:
        self.monitor.step(self.batch_size, self.tloss, self._get_memory())

    def _end_train_pass(self) -> None:
        self.monitor.end_train_pass()

    def save_metrics(self, metrics: dict[str, float]) -> None:
        """results.csv is rewritten from the rows in the checkpoint, so it never holds an epoch that was not saved."""
        row = {"epoch": self.epoch + 1, **metrics, **self.monitor.epoch_facts()}
        self.rows.append(row)
        self.monitor.end_epoch(self.rows, self.validator, (self.best_fitness, self.best_epoch))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self) -> bool:
        """last.pt holds everything the next epoch depends on; best.pt the scored state alone."""
        scored = {"scored": scored_state(self.held_out), "epoch": self.epoch, "fitness": self.fitness}
        if self.best_epoch == self.epoch + 1:
            save_checkpoint(self.best, self.config, scored)
        state = {
            "model": scored_state(unwrap_model(self.model)), "ema": scored_state(self.ema.ema),
            "ema_updates": self.ema.updates, "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "best_fitness": self.best_fitness, "best_epoch": self.best_epoch,
            "rows": self.rows,
        }  # fmt: skip
        save_checkpoint(self.last, self.config, {**scored, **state})
        return True

    def resume_training(self, ckpt: Any) -> None:
        """Continues after the last saved epoch, if there is one."""
        if not self.last.exists():
            return
        state = load_checkpoint(self.last)
        unwrap_model(self.model).load_state_dict(state["model"])
        self.ema.ema.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.best_fitness, self.best_epoch, self.rows = state["best_fitness"], state["best_epoch"], state["rows"]
        self.start_epoch = state["epoch"] + 1
        log.info("train %s: continues after epoch %d of %d", self.config.label, self.start_epoch, self.epochs)

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Stops a diverged training; the checkpoint of the epoch before stays as it is."""
        if not self.loss.isfinite():
            raise RuntimeError(f"the loss is not finite in epoch {epoch + 1}: {self.last} holds the epoch before")
        return False

    def final_eval(self) -> None:
        """Nothing to do: best.pt was scored when it was written, and holds no optimizer to strip."""
