"""The training loop: epochs, steps, validation, checkpoints, and the rollback after a NaN or infinity."""

from __future__ import annotations

import logging
import signal
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from ultralytics.utils.torch_utils import unset_deterministic

from app.core.files import write_json
from app.core.results import AP, CORRECTED_AP, SCORED, SCORED_AP, WARM_UP, write_rows
from app.quant.health import Oscillations, is_in_window
from app.quant.model import cpu_state_dict, load_checkpoint, save_checkpoint
from app.quant.options import Stabiliser, stabilisers
from app.train import checkpoint
from app.train.bn_images import BnImages
from app.train.correction import correct, keep_better, model_of
from app.train.distill import read_teacher
from app.train.graph import StepGraph
from app.train.guard import GuardStop, judge
from app.train.interrupt import Interrupt, Interrupted
from app.train.monitor import After, Monitor
from app.train.nonfinite import NonFinite, Watch, check_finite, file_name, find_cause, to_keep
from app.train.processes import on_main
from app.train.state import State
from app.train.step import Rise, clipped_step, trained_weights, warm_up, watched_terms
from app.train.trainer import Trainer
from app.train.validation import SCORES, examine, score_states
from app.train.validator import HeldOut, tensors_of

log = logging.getLogger(__name__)


class Loop:
    """Trains from the last checkpoint to the last epoch.

    Steps, schedule and warm-up are those of Ultralytics (engine/trainer.py _do_train, 8.4.190). Besides, an epoch ends
    with an optimizer step, so that no half-accumulated gradient outlives a checkpoint.
    """

    # set_up makes these, validate the last one:
    state: State
    options: list[Stabiliser]
    oscillations: Oscillations
    scored_model: Any = None  # that of the last validation

    def __init__(self, trainer: Trainer, after: After | None = None) -> None:
        self.trainer, self.config, self.ranks = trainer, trainer.config, trainer.ranks
        self.watch = Watch(trainer.device)
        self.interrupt = Interrupt(f"{self.config.label}/weights/{trainer.last.name}")
        self.monitor = Monitor(trainer.save_dir, self.config, after, self.ranks.is_main)
        self.restarts_loader = True  # the loader does not stand at the next batch

    def run(self) -> None:
        """Trains.

        Raises:
            Interrupted: a signal came; everything is saved.
            GuardStop: the guard ended the training; everything is saved.
        """
        try:
            with self.interrupt:
                self.set_up()
                try:
                    while self.state.next_epoch < self.config.train.epochs:
                        self._run_epoch(self.state.next_epoch)
                    on_main(self.ranks, self.interrupt, self.save, self._correct_best)
                finally:
                    if self.ranks.is_main:
                        self.monitor.close()
                    self.trainer.close()
        finally:
            unset_deterministic()  # of the whole process, see Ultralytics' train

    def set_up(self) -> None:
        """Builds what is trained, and loads the last checkpoint or, in a new training, writes the first."""
        trainer = self.trainer
        trainer.set_up()
        self.options = stabilisers(self.config, trainer.model, trainer.ema.ema)
        self.oscillations = Oscillations(trainer.model)
        self.full_accumulate = trainer.accumulate
        self.bn_images = BnImages(trainer.train_loader.dataset, trainer.args, self.config)
        self.state = State(
            net=trainer.model, ema=trainer.ema, optimizer=trainer.optimizer, scaler=trainer.scaler,
            stabilisers=[*self.options, self.oscillations], ranks=self.ranks, accumulate=trainer.accumulate,
            loss_names=list(trainer.model.criterion.one2one.loss_names),
        )  # fmt: skip
        n_own = trainer.train_loader.batch_sampler.sampler.n_own
        teacher = read_teacher(self.config, trainer.save_dir.parent, trainer.device, self.ranks)
        self.forward = partial(trainer.forward, beside=teacher and teacher.beside)
        self.forward_alone = partial(trainer.forward, beside=teacher and teacher.alone().beside)
        self.graph = StepGraph(self.state, n_own, self.config.train, trainer.palette, teacher)
        saved = checkpoint.read_in_turn(trainer.last, self.ranks)
        first = saved or checkpoint.state_from_fp16(self.state, self.config)
        if first:
            checkpoint.restore(self.state, first, trainer.last if saved else self.config.warmup_from or trainer.last)
            self.interrupt.kept = checkpoint.resume_point(self.state)
            if self.state.rows and self.ranks.is_main:  # done.make_ready has deleted results.csv
                write_rows(trainer.save_dir / "results.csv", self.state.rows)
            checkpoint.log_resume(self.state, self.config)
        if not saved:
            self.save()

    # --- an epoch ----------------------------------------------------------------------------------------------------

    def _run_epoch(self, epoch: int) -> None:
        """Trains what is left of an epoch, or goes back to the last checkpoint where it meets a fault."""
        try:
            self._start_epoch(epoch)
            self._train_epoch()
            self._end_epoch()
        except NonFinite as fault:
            self._roll_back(fault)

    def _start_epoch(self, epoch: int) -> None:
        """Learning rate, mosaic and data of an epoch are functions of its number, whatever ran before it."""
        trainer, state = self.trainer, self.state
        state.epoch = epoch
        if state.batch_in_epoch == 0:
            for group in state.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * trainer.lf(epoch)
        n_without_mosaic = self.config.hyp.close_mosaic
        first_without = self.config.train.epochs - n_without_mosaic
        closes, closed_before = epoch == first_without, epoch > first_without
        if n_without_mosaic and (closes or (closed_before and self.restarts_loader)):
            trainer._close_dataloader_mosaic()
            self.restarts_loader = True
        if self.restarts_loader:
            trainer.read_from(epoch, state.batch_in_epoch)
            self.restarts_loader = False
        if epoch == self.config.n_quant_warmup_epochs:
            state.codes_before, self.scored_model = torch.zeros(0, dtype=torch.int8), None  # those are of other bits
            self.graph.release()
        for stabiliser in state.stabilisers:
            stabiliser.start_epoch(epoch)
        trainer._model_train()

    def _train_epoch(self) -> None:
        trainer, state, batch_size = self.trainer, self.state, self.config.train.batch
        n_batches, n_images = len(trainer.train_loader), len(trainer.train_loader.dataset)
        n_before = state.batch_in_epoch * batch_size
        self.monitor.start_epoch(state.epoch, trainer.epochs, n_images, n_before, state.trained_s)
        for batch in islice(trainer.train_loader, n_batches - state.batch_in_epoch):
            number = state.epoch * n_batches + state.batch_in_epoch
            state.batch_in_epoch += 1
            self._warm_up_lr(number, n_batches)
            if number not in state.left_out:
                self.watch.next(number, batch)
                self.backward(batch)
            n_left = n_batches - state.batch_in_epoch
            if self._is_validation_due() and is_in_window(n_left, n_batches):
                self.oscillations.open(state.epoch)
            if number - state.last_step >= state.accumulate or n_left == 0:
                if self.watch.of_step:  # empty where every batch of this step is left out
                    self.optimizer_step()
                state.last_step = number
                self._save_if_due()
            n_trained = min(batch_size, n_images - (state.batch_in_epoch - 1) * batch_size)
            self.monitor.step(n_trained, partial(state.mean_losses, n_batches))

    def _warm_up_lr(self, number: int, n_batches: int) -> None:
        """Learning rates, momentum and accumulation rise to their values over the first steps, as in Ultralytics."""
        trainer, state = self.trainer, self.state
        n_warmup = trainer._get_warmup_iterations(n_batches)
        if n_warmup and number <= n_warmup:
            rise = Rise(number, n_warmup)
            state.accumulate = max(1, round(rise.between(1, self.full_accumulate)))
            warm_up(state.optimizer, self.config.hyp, rise, trainer.lf(state.epoch))

    def backward(self, batch: dict[str, Any]) -> None:
        """Adds the gradients of one batch, and its losses to the epoch's sums; nothing here waits for the GPU."""
        terms = self.graph.run(batch)
        if terms is not None:
            self.watch.add_loss(self.state.add_losses(terms))
            return
        loss, items = self.forward(self.state.net, batch)
        terms = watched_terms(loss, torch.stack(list(items.values())))
        self.watch.add_loss(self.state.add_losses(terms))
        self.state.scaler.scale(loss).backward()

    def optimizer_step(self) -> None:
        state = self.state
        grads = [weight.grad for weight in trained_weights(state.optimizer) if weight.grad is not None]
        self.ranks.all_reduce_together(grads)  # the losses of the parts add up to the batch's
        if self.options:
            scale = state.scaler.get_scale()  # waits for the GPU
            for option in self.options:
                option.before_step(scale)
        clipped_step(state.optimizer, state.scaler, self.watch.add_step)
        state.ema.update(state.net)
        for stabiliser in state.stabilisers:
            stabiliser.after_step()

    def _end_epoch(self) -> None:
        """Validates where it is due, then writes what the epoch gave."""
        state = self.state
        self.monitor.end_train_pass()
        state.trained_s = self.monitor.train_s
        check_finite(state.net, state.scaler, self.watch)  # rank 0 validates alone: no rank may roll back then
        losses = state.mean_losses(len(self.trainer.train_loader))
        row: dict[str, Any] = {"epoch": state.epoch + 1, **losses}
        if self._is_validation_due():
            self._save_if_due(ahead_s=self.monitor.validation_s(len(self.trainer.test_loader.dataset)))
            row |= on_main(self.ranks, self.interrupt, self.save, self.validate)
            row |= self._examine() if self.ranks.is_main else {}
        row |= {f"lr/pg{i}": group["lr"] for i, group in enumerate(state.optimizer.param_groups)}
        state.net.criterion.update()  # the weights of the two heads, as Ultralytics has them in the next epoch
        state.rows.append(row | self.monitor.epoch_facts())
        state.batch_in_epoch, state.trained_s, state.loss_sum = 0, 0.0, 0.0
        if self.ranks.is_main:
            self.monitor.end_epoch(state.rows, self.trainer.validator, state.best_fitness, state.best_epoch)
        self._save_if_due(always=True)
        judge(state.rows, self.config.guard)

    # --- validation --------------------------------------------------------------------------------------------------

    def _is_validation_due(self) -> bool:
        """Whether this epoch ends with a validation."""
        n_done = self.state.epoch + 1
        return n_done % self.config.train.val_every == 0 or n_done == self.config.train.epochs

    def validate(self) -> dict[str, float]:
        """Scores raw weights, EMA, and EMA with BatchNorm re-estimated; after a quant warm-up the last picks best.pt.

        Returns:
            columns of results.csv.
        """
        state = self.state
        scores = score_states(state, self._score, self._reestimate, self.scored_model)
        self.scored_model, state.scored = scores.model, cpu_state_dict(scores.model)
        columns, fitness = scores.columns, scores.columns[SCORED_AP]
        if state.epoch < self.config.n_quant_warmup_epochs:
            columns[WARM_UP] = 1
        elif state.best_fitness is None or fitness > state.best_fitness:
            names = self.trainer.provenance["names"]
            entries = {"scored": state.scored, "epoch": state.epoch, "fitness": fitness, "names": names}
            save_checkpoint(self.trainer.best, self.config, entries)
            state.best_fitness, state.best_epoch = fitness, state.epoch + 1
        return columns

    def _examine(self) -> dict[str, float]:
        """Health of the validated state, as columns of results.csv; health.json where that state is in best.pt."""
        state = self.state
        health = examine(state, self.scored_model, self.oscillations)
        if health.snr_db and state.best_epoch == state.epoch + 1:
            facts = {"epoch": state.best_epoch, "snr_db": health.snr_db}
            write_json(self.trainer.save_dir / "health.json", facts)
        return health.columns

    def _score(self, held_out: HeldOut) -> dict[str, dict[str, float]]:
        return self.trainer.score(held_out)

    def _reestimate(self, model: nn.Module) -> None:
        self.trainer.reestimate(model, self.bn_images.after(self.state.epoch), self.graph.enabled)

    def _correct_best(self) -> None:
        """Corrects best.pt on one epoch of train images where quant.correction_epochs says so; once.

        best.pt is replaced if its AP is not lower. results.csv gets AP/corrected in its last row.
        """
        quant, trainer, state = self.config.quant, self.trainer, self.state
        if quant is None or not quant.correction_epochs or CORRECTED_AP in state.rows[-1]:
            return
        best = load_checkpoint(trainer.best)
        if best.get("corrected"):  # by a process that was killed before last.pt had it
            ap = state.best_fitness = best["fitness"]
        else:
            ap = self._correct(best, quant.correction_lr)
        state.rows[-1][CORRECTED_AP] = ap
        write_rows(trainer.save_dir / "results.csv", state.rows)
        self.monitor.writer.add_scalar(CORRECTED_AP, ap, trainer.epochs)
        self.save()

    def _correct(self, best: dict[str, Any], lr: float) -> float:
        """Corrects the content of best.pt; gives the AP of the result."""
        trainer = self.trainer
        model = model_of(self.state, best["scored"])
        self.graph.release()  # its memory is needed
        correct(model, trainer.extra_epoch(), lambda net, batch: trainer.forward(net, batch)[0], lr, self.ranks.n)
        ap = self._score(HeldOut(model, {SCORED: tensors_of(model)}))[SCORED][SCORES[AP]]
        self.state.best_fitness = keep_better(trainer.best, self.config, best, model, ap)
        return ap

    # --- checkpoints, faults, errors ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes last.pt, before the first step start.pt, on rank 0.

        Raises:
            NonFinite: the state is not worth keeping.
        """
        check_finite(self.state.net, self.state.scaler, self.watch)
        if self.ranks.is_main:
            checkpoint.save_state(self.state, self.config, self.trainer.last)
            self.interrupt.kept = checkpoint.resume_point(self.state)
            self.interrupt.is_kept = self.trainer.last.exists()

    def _save_if_due(self, ahead_s: float = 0.0, always: bool = False) -> None:
        """Saves where it is time to, or will be in `ahead_s` seconds, in which nothing can be saved, or where a signal
        has come. After a signal all ranks leave at this step, or none."""
        own_signal = self.interrupt.signal or (signal.SIGTERM if self.ranks.is_orphan else 0)
        is_due = self.ranks.is_main and self.monitor.save_due(self.config.train.save_every_s, ahead_s)
        signal_number, due = self.ranks.maximum([own_signal, int(is_due)])
        if signal_number or due or always:
            if self.state.batch_in_epoch:
                self.state.trained_s = self.monitor.trained_s
            self.save()
        if signal_number:  # a signal that has come since waits for the next step: the other ranks do not know of it
            raise Interrupted(signal_number)

    def _roll_back(self, fault: NonFinite) -> None:
        """Loads the newest checkpoint again; training goes on from there without the batches of the fault.

        Everything else keeps its place: order and augmentation of the other batches, and the schedule, follow from
        their numbers. The left-out batches are part of last.pt, so a resumed training leaves out the same ones.

        Raises:
            GuardStop: guard.max_rollbacks is used up; last.pt holds the last good state.
        """
        state, trainer = self.state, self.trainer
        self.graph.release()  # its memory is needed: the batch is computed again without it
        place, cause = find_cause(state, fault, self.forward_alone, len(trainer.train_loader))
        numbers = [number for number, _ in fault.batches]
        path = trainer.save_dir / "faults" / file_name(fault, self.ranks)
        save_checkpoint(path, self.config, to_keep(state, fault, cause))
        faults = [*state.faults, {"batches": numbers, "what": fault.what, "cause": cause}]
        state.load_state_dict(load_checkpoint(checkpoint.newest_of(trainer.last)))
        self.ranks.barrier()  # all have read it
        state.faults = faults
        state.optimizer.zero_grad()
        self.watch.clear()
        self.restarts_loader = True
        self.save()
        most = self.config.guard.max_rollbacks
        text = f"guard: {fault} at {place}, first in: {cause}; kept for study in {path}"
        if len(faults) > most:
            raise GuardStop(
                f"{text}; {most} rollbacks (guard.max_rollbacks) are used up and last.pt holds the last good state: "
                "look at the batch, or lower hyp.lr0 in a new run"
            )
        log.warning(
            "%s; back to the last good state, on without this batch (rollback %d of %d)", text, len(faults), most
        )
