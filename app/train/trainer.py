"""The trainer: one subclass of Ultralytics' DetectionTrainer for both variants."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from ultralytics.data.build import build_dataloader
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.torch_utils import ModelEMA, autocast, init_seeds, unwrap_model

from app.core.config import read_yaml, validate
from app.core.files import read_json, write_json
from app.core.results import WARM_UP
from app.quant.health import WINDOW_STEPS, Oscillations
from app.quant.model import build, save_checkpoint, scored_state
from app.quant.options import exempt_scales_from_decay, stabilisers
from app.train.bn_images import BnImages, ema_decay
from app.train.checkpoint import check_finite, continue_from_checkpoint, save_state
from app.train.correction import correct_best
from app.train.guard import judge
from app.train.interrupt import Interrupt, Interrupted
from app.train.loader import CocoDataset, limit_wait, train_loader
from app.train.monitor import Monitor
from app.train.nonfinite import NonFinite, Watch
from app.train.processes import ALONE, Ranks, explain
from app.train.rollback import roll_back
from app.train.step import clipped_step, fuse
from app.train.validation import Validator, examine, score_states

T = TypeVar("T")
log = logging.getLogger(__name__)


class Trainer(DetectionTrainer):
    """Both variants. Network, data, optimizer, schedule, EMA and validator are Ultralytics'; the loop is ours.

    Ultralytics' loop (engine/trainer.py _do_train, 8.4.190) reads the loss from the GPU at every step, halves the batch
    without being asked when memory runs out, and cannot begin inside an epoch. Steps, schedule and warm-up are the same
    here; besides, an epoch ends with an optimizer step, so that no half-accumulated gradient outlives a checkpoint.

    The configuration comes from save_dir/config.yaml, so that a process that only knows `overrides` can build it.
    """

    # Ultralytics starts these as None or as a file name; from _setup_train on they are:
    model: Any
    ema: ModelEMA
    validator: Any
    held_out: Any
    loss: torch.Tensor
    loss_items: dict[str, torch.Tensor]
    train_loader: Any
    scaler: Any
    optimizer: Any
    amp: Any
    epochs: int
    lf: Any
    fitness: float

    def __init__(
        self, cfg: Any = DEFAULT_CFG, overrides: Any = None, _callbacks: Any = None, ranks: Ranks = ALONE
    ) -> None:
        out_dir = Path((overrides or {})["save_dir"])
        self.config = validate(read_yaml(out_dir / "config.yaml"))
        super().__init__(cfg, overrides, _callbacks)
        self.ranks = ranks
        if self.device.type == "cpu":  # Ultralytics leaves one core idle (select_device: NUM_THREADS), 8.4.190
            torch.set_num_threads(max((os.cpu_count() or 1) // ranks.n_local, 1))
        init_seeds(self.config.train.seed, deterministic=self.config.train.deterministic)
        # Deterministic mode also fills every new tensor with NaN, to show reads of unwritten memory; at 640 px that is
        # a second pass of writes over all activations.
        cast(Any, torch.utils.deterministic).fill_uninitialized_memory = False
        self.provenance = read_json(Path(self.args.data).parent / "provenance.json", "data")
        self.rows: list[dict[str, float]] = []
        self.best_epoch = self.batch_in_epoch = 0
        self.last_step = -1
        self.loss_sum: Any = 0.0
        self.scored: dict[str, torch.Tensor] = {}
        self.codes_before = torch.zeros(0, dtype=torch.int8)
        self.faults: list[dict[str, Any]] = []
        self.watch = Watch(self.device)
        self.interrupt = Interrupt()
        self.monitor = Monitor(out_dir, self.config, writes=ranks.is_first)

    @property
    def net(self) -> Any:
        """The network without DistributedDataParallel around it."""
        return unwrap_model(self.model)

    # --- what is trained on what -------------------------------------------------------------------------------------

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Quantization happens here, before the optimizer and the EMA copy are made."""
        model, quant_config = build(self.config)
        if quant_config and self.ranks.is_first:
            write_json(self.save_dir / "quant_config.json", quant_config)
        return model

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """For training this process's parts of the batches; for validation all images, in batches of a part's size."""
        n, workers = self.ranks.n, self.args.workers
        if mode == "train":
            dataset = self.build_dataset(dataset_path, mode, batch_size)
            return train_loader(dataset, workers, self.device.type == "cuda", part=(self.ranks.rank, n))
        dataset = self.build_dataset(dataset_path, mode, -(-batch_size // n))
        return limit_wait(
            build_dataloader(dataset, dataset.batch_size, workers, shuffle=False, rank=-1, device=self.device)
        )

    def build_optimizer(self, model: Any, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Ultralytics' optimizer and groups; fused on a GPU."""
        optimizer = super().build_optimizer(model, *args, **kwargs)
        exempt_scales_from_decay(optimizer, model)
        return fuse(optimizer) if self.device.type == "cuda" else optimizer

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> CocoDataset:
        return CocoDataset(
            mode, self.data, self.provenance, self.args.seed,
            imgsz=self.args.imgsz, batch_size=batch, hyp=self.args, cache=self.args.cache or None,
        )  # fmt: skip

    def get_validator(self) -> Validator:
        return Validator(self.test_loader, save_dir=self.save_dir, args=deepcopy(self.args), _callbacks=self.callbacks)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _do_train(self) -> None:
        """Trains from the last checkpoint to the last epoch.

        Raises:
            UserError: GPU memory does not suffice.
            Interrupted: a signal came; everything is saved.
        """
        with self.interrupt:
            self._setup_train()
            try:
                epoch = self.start_epoch
                while epoch < self.epochs:
                    self.epoch = epoch
                    epoch = self._run_epoch()
                self._on_first(lambda: correct_best(self))
            except RuntimeError as error:
                explain(error, self.config)
                raise
            finally:
                if self.ranks.is_first:
                    self.monitor.close()
                self.train_loader.close()
                self.test_loader.close()

    def _run_epoch(self) -> int:
        """Returns the number of the epoch that comes next: this one again where it met a fault and went back."""
        try:
            self._start_epoch()
            self._train_epoch()
            self._end_epoch()
        except NonFinite as fault:
            roll_back(self, fault)
            return self.start_epoch
        return self.epoch + 1

    def _setup_train(self) -> None:
        super()._setup_train()
        t = self.config.train
        if self.ranks.n > 1:
            quant = self.config.quant  # learned scales have no gradient while the weights are float
            may_skip = quant is not None and quant.learned_scale and quant.warmup_share > 0
            self.model = self.ranks.parallel(self.model, may_skip)
            self.amp = self.ranks.share(self.amp)  # Ultralytics checks it in the first process alone
            self.scaler = torch.amp.GradScaler("cuda", enabled=self.amp)  # pyright: ignore[reportPrivateImportUsage]
        self.ema.decay = lambda x: ema_decay(t, x)
        self.full_accumulate = self.accumulate
        self.bn_images = BnImages(self.train_loader.dataset, self.args, self.config)
        self.oscillations = Oscillations(self.net)
        self.options = stabilisers(self.config, self.net, self.ema.ema)
        self.stabilisers = [*self.options, self.oscillations]
        continue_from_checkpoint(self)

    def _start_epoch(self) -> None:
        """Learning rate, mosaic and data of an epoch are functions of its number, whatever ran before it."""
        if self.batch_in_epoch == 0:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.lf(self.epoch)
        first = self.epoch == self.start_epoch
        mosaic_ends = self.args.close_mosaic and self.epoch >= self.epochs - self.args.close_mosaic
        if mosaic_ends and (first or self.epoch == self.epochs - self.args.close_mosaic):
            self._close_dataloader_mosaic()
            first = True
        if first:
            self.train_loader.batch_sampler.sampler.start(self.epoch, self.batch_in_epoch)
            self.train_loader.reset()
        if self.epoch == self.config.n_warmup_epochs:
            self.codes_before = torch.zeros(0, dtype=torch.int8)  # of other bits
        for stabiliser in self.stabilisers:
            stabiliser.start_epoch(self.epoch)
        self._model_train()

    def _train_epoch(self) -> None:
        n_batches, n_images = len(self.train_loader), len(self.train_loader.dataset)
        self.monitor.start_epoch(self.epoch, self.epochs, n_images, self.batch_in_epoch * self.batch_size)
        for batch in islice(self.train_loader, n_batches - self.batch_in_epoch):
            step = self.epoch * n_batches + self.batch_in_epoch
            self.batch_in_epoch += 1
            self._warm_up(step, n_batches)
            if step not in self.left_out():
                self.watch.next(step, batch)
                self._backward(batch)
            if self._is_validated() and n_batches - self.batch_in_epoch < min(WINDOW_STEPS, n_batches / 4):
                self.oscillations.open(self.epoch)
            if step - self.last_step >= self.accumulate or self.batch_in_epoch == n_batches:
                if self.watch.of_step:
                    self.optimizer_step()
                self.last_step = step
                self._save_if_due()
            n_here = min(self.batch_size, n_images - (self.batch_in_epoch - 1) * self.batch_size)
            self.monitor.step(n_here, self.mean_losses)

    def _save_if_due(self, always: bool = False) -> None:
        """Saves where it is time to or a signal has come; then all processes leave at this step, or none."""
        own = self.interrupt.signal or (signal.SIGTERM if self.ranks.is_orphan else 0)
        due = self.ranks.is_first and self.monitor.save_due(self.config.train.save_every_s)
        number, due = self.ranks.most([own, int(due)])
        if number or due or always:
            self.save_model()
        if number:  # not one that has come since: the others do not know of it
            raise Interrupted(number)

    def left_out(self) -> set[int]:
        """Numbers of the batches that a loss or gradient was not finite with."""
        return {number for fault in self.faults for number in fault["batches"]}

    def _is_validated(self) -> bool:
        """Whether this epoch ends with a validation."""
        n_done = self.epoch + 1
        return n_done % self.config.train.val_every == 0 or n_done == self.epochs

    def _warm_up(self, step: int, n_batches: int) -> None:
        """Learning rates, momentum and accumulation rise to their values over the first steps, as in Ultralytics."""
        n_warmup, args = self._get_warmup_iterations(n_batches), self.args
        if step > n_warmup or not n_warmup:
            return
        self.accumulate = max(1, round(float(np.interp(step, [0, n_warmup], [1, self.full_accumulate]))))
        for group in self.optimizer.param_groups:
            start = args.warmup_bias_lr if group.get("param_group") == "bias" else 0.0
            target = group["initial_lr"] * self.lf(self.epoch)
            group["lr"] = float(np.interp(step, [0, n_warmup], [start, target]))
            if "momentum" in group:
                group["momentum"] = float(np.interp(step, [0, n_warmup], [args.warmup_momentum, args.momentum]))

    def _backward(self, batch: dict[str, Any]) -> None:
        """Adds the gradients of one batch, and its losses to the epoch's sums; nothing here waits for the GPU."""
        with autocast(self.amp, device=self.device.type):
            loss, self.loss_items = self.model(self.preprocess_batch(batch))
            self.loss = loss.sum() * self.ranks.n  # DistributedDataParallel takes the mean, and the parts add up
        self.loss_names = tuple(self.loss_items)
        items = self.ranks.add(torch.stack(list(self.loss_items.values())).detach())
        self.loss_sum = self.loss_sum + items
        self.watch.add_loss(items.sum())
        self.scaler.scale(self.loss).backward()

    def optimizer_step(self) -> None:
        if self.options:
            scale = self.scaler.get_scale()  # waits for the GPU
            for stabiliser in self.options:
                stabiliser.before_step(scale)
        clipped_step(self.optimizer, self.scaler, self.watch.add_step)
        self.ema.update(self.model)
        for stabiliser in self.stabilisers:
            stabiliser.after_step()

    def mean_losses(self) -> dict[str, float]:
        """Means over the epoch so far, by name; waits for the GPU."""
        first = self.epoch * len(self.train_loader)
        n_left_out = sum(first <= number < first + self.batch_in_epoch for number in self.left_out())
        means = (self.loss_sum / (self.batch_in_epoch - n_left_out)).tolist()
        return {f"train/{name}": round(value, 5) for name, value in zip(self.loss_names, means, strict=True)}

    def _end_epoch(self) -> None:
        """Validates where it is due, then writes what the epoch gave."""
        self.monitor.end_train_pass()
        check_finite(self)  # before the first process goes on alone
        losses = self.mean_losses()
        row: dict[str, Any] = {"epoch": self.epoch + 1, **losses}
        if self._is_validated():
            row |= self._on_first(self.validate)
            row |= examine(self) if self.ranks.is_first else {}
        row |= {f"lr/pg{i}": group["lr"] for i, group in enumerate(self.optimizer.param_groups)}
        self.net.criterion.update()
        self.rows.append(row | self.monitor.epoch_facts())
        self.batch_in_epoch, self.loss_sum = 0, 0.0
        if self.ranks.is_first:
            self.monitor.end_epoch(self.rows, self.validator, (self.best_fitness, self.best_epoch))
        self._save_if_due(always=True)
        judge(self.rows, self.config.guard)

    # --- validation in three states ----------------------------------------------------------------------------------

    def _on_first(self, work: Callable[[], T]) -> T:
        """What the first process computes; the others wait for it, and leave with it if a signal ends it there."""
        result = None
        if self.ranks.is_first:
            with self.interrupt.at_once(self._save_and_tell):
                result = work()
        result, stopped_by = self.ranks.share((result, 0))
        if stopped_by:
            raise Interrupted(stopped_by)
        return cast(T, result)

    def _save_and_tell(self) -> None:
        self.save_model()
        self.ranks.share((None, self.interrupt.signal))

    def validate(self) -> dict[str, float]:
        """Scores the three states; the last one is the fitness, and best.pt where it is the best after a warm-up."""
        metrics = score_states(self, self._bn_batches())
        self.fitness = metrics["AP/ema_bn"]
        self.scored = scored_state(self.held_out)
        if WARM_UP not in metrics and (self.best_fitness is None or self.fitness > self.best_fitness):
            entries = {"scored": self.scored, "epoch": self.epoch, "fitness": self.fitness}
            save_checkpoint(self.best, self.config, entries)
            self.best_fitness, self.best_epoch = self.fitness, self.epoch + 1
        return metrics

    def _bn_batches(self) -> Iterator[torch.Tensor]:
        """Train batches as the averaged weights have seen them: [N,3,H,W], 0..1, on the device."""
        for images in self.bn_images.after(self.epoch):
            yield self.preprocess_batch({"img": images})["img"]

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self) -> None:
        save_state(self)
