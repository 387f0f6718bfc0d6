"""The parts of a training, made by Ultralytics: network, loaders, optimizer, validator. loop.py trains with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy, deepcopy
from typing import Any, cast

import torch
from torch import nn
from ultralytics.data.build import build_dataloader
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.torch_utils import ModelEMA, autocast, init_seeds

from app.core.config import Config, UserError
from app.core.environment import n_threads
from app.core.files import read_json, write_json
from app.core.progress import Meter, counted, track
from app.core.run import VIEW_SHAPE, RunRoot
from app.core.start import RANDOM
from app.quant.batchnorm import reestimate_batchnorm
from app.quant.model import build
from app.quant.norm import install, is_installed
from app.quant.options import exempt_scales_from_decay
from app.quant.start import read_start
from app.train.batches import Part, Place
from app.train.bn_images import pinned_ahead
from app.train.colours import Palette, palette, recolour
from app.train.loader import COLOURS, CocoDataset, dataset_of, limit_wait, train_loader
from app.train.processes import ALONE, Ranks
from app.train.replay import reestimate_by_replay
from app.train.step import FurtherLoss, criterion_of_part, ema_decay, fuse, loss_of, unwritten_inputs
from app.train.validator import HeldOut, KernelValidator, Validator, without_one2many


class Trainer(DetectionTrainer):
    """Both variants. Everything here is Ultralytics' but quantization, samples by ticket and part, and EMA's decay.

    Ultralytics' own loop (engine/trainer.py _do_train, 8.4.190) reads the loss from the GPU at every step, halves the
    batch without being asked when memory runs out, and cannot begin inside an epoch; app.train.loop replaces it.

    Args:
        config: of one variant.
        run: its run root, with a prepared dataset.
        device: of this process, as Ultralytics names it: 'cpu' or the number of a GPU.
        ranks: this process among those of the training.
    """

    # Ultralytics starts these as None or as a file name; after set_up they are:
    model: Any
    ema: ModelEMA
    validator: Any
    train_loader: Any
    scaler: Any
    optimizer: Any
    amp: Any
    epochs: int
    accumulate: int
    lf: Any

    def __init__(self, config: Config, run: RunRoot, device: str, ranks: Ranks = ALONE) -> None:
        self.config, self.ranks = config, ranks
        self.provenance = read_json(run.provenance, "data", VIEW_SHAPE)
        self.dataset_dir = run.dataset_yaml.parent.resolve()
        super().__init__(DEFAULT_CFG, ultralytics_args(config, run, device))
        if self.device.type == "cpu":  # Ultralytics takes all cores of the machine but one (NUM_THREADS), 8.4.190
            torch.set_num_threads(n_threads(ranks.n_local))
        init_seeds(config.train.seed, deterministic=config.train.deterministic)
        # Deterministic mode also fills every new tensor with NaN, to show reads of unwritten memory; at 640 px that is
        # a second pass of writes over all activations.
        cast(Any, torch.utils.deterministic).fill_uninitialized_memory = False
        self.palette: Palette | None = None  # set where the GPU gives the images their colours

    def set_up(self) -> None:
        """Builds network, EMA, loaders, optimizer, scaler and validator.

        Raises:
            UserError: Ultralytics trains on this GPU without the FP16 autocast that train.amp asks for.
        """
        if self.device.type == "cuda" and self.config.train.kernels:
            self.palette = palette(self.config.train.imgsz, self.device)
        self._setup_train()
        if self.ranks.n > 1:
            self.ranks.share(self.model)
            self.amp = self.ranks.broadcast(self.amp)  # Ultralytics checks it on rank 0 alone
            self.scaler = torch.amp.GradScaler("cuda", enabled=self.amp)  # pyright: ignore[reportPrivateImportUsage]
        if self.device.type == "cuda" and self.config.train.amp and not self.amp:
            raise UserError(
                "train.amp=true, but FP16 autocast is not right on this GPU by Ultralytics' check (log.txt): set "
                "train.amp=false"
            )
        self.model.criterion = criterion_of_part(self.model, self.ranks)
        self.ema.decay = lambda x: ema_decay(self.config.train, x)

    def facts(self) -> dict[str, Any]:
        """What training really uses, for env.json."""
        args, amp = self.args, self.config.train.amp
        return {
            "device": str(self.device), "processes": self.ranks.n, "workers": args.workers, "seed": args.seed,
            "deterministic": args.deterministic, "amp_requested": amp, "amp": amp and self.device.type == "cuda",
            "torch_threads": torch.get_num_threads(),
        }  # fmt: skip

    def headline(self) -> str:
        """One line: what is trained on what, how and where."""
        train, n = self.config.train, self.ranks.n
        n_images, title = self.provenance["splits"]["train"]["n_images"], self.provenance["title"]
        precision = "FP16 autocast" if train.amp and self.device.type == "cuda" else "float32"
        return (
            f"{self.config.model_name} {self.config.train.weights or RANDOM}, {n_images:,} images of {title}, "
            f"{train.epochs} epochs, batch {train.batch}, {train.imgsz} px, {precision}, "
            + (f"{n} processes, {self.device.type}" if n > 1 else str(self.device))
        )

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Quantization happens here, before the optimizer and the EMA copy are made."""
        start = self.config.train.weights
        is_new = not any(self.last.parent.glob("last*.pt"))  # else a checkpoint of this training replaces the weights
        weights = read_start(start) if start and is_new else None
        model, quant_config = build(self.config, self.provenance["names"], weights)
        if quant_config and self.ranks.is_main:
            write_json(self.save_dir / "quant_config.json", quant_config)
        if self.device.type == "cuda" and self.config.train.kernels:
            install(model)
        return model

    def get_dataset(self) -> dict[str, Any]:
        """Made from what is known. Ultralytics' own reads coco.yaml, and executes what its `download:` says."""
        return dataset_of(self.dataset_dir, self.provenance["names"])

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """For training this rank's parts of the batches; for validation all images, in batches of a part's size."""
        n, workers = self.ranks.n, self.args.workers
        if mode == "train":
            dataset = self.build_dataset(dataset_path, mode, batch_size)
            return train_loader(dataset, workers, self.device.type == "cuda", part=Part(self.ranks.rank, n))
        dataset = self.build_dataset(dataset_path, mode, -(-batch_size // n))
        loader = build_dataloader(dataset, dataset.batch_size, workers, shuffle=False, rank=-1, device=self.device)
        return limit_wait(loader)

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> CocoDataset:
        dataset = CocoDataset(
            mode, self.data, self.provenance, self.args.seed,
            imgsz=self.args.imgsz, batch_size=batch, hyp=self.args, cache=self.args.cache or None,
            n_sharing=self.ranks.n_local,
        )  # fmt: skip
        return dataset.view(copy(self.args), colours_later=True) if mode == "train" and self.palette else dataset

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device, images float32 0..1, whose colours are new where a loader process has left them."""
        colours = batch.pop(COLOURS, None)
        if colours is not None:
            images, colours = (part.to(self.device, non_blocking=True) for part in (batch["img"], colours))
            batch["img"] = recolour(images, colours, cast(Palette, self.palette))
        return super().preprocess_batch(batch)

    def build_optimizer(self, model: Any, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Ultralytics' optimizer and groups; fused on a GPU."""
        optimizer = super().build_optimizer(model, *args, **kwargs)
        exempt_scales_from_decay(optimizer, model)
        return fuse(optimizer) if self.device.type == "cuda" else optimizer

    def get_validator(self) -> Validator:
        kind = KernelValidator if is_installed(self.model) else Validator
        validator = kind(self.test_loader, save_dir=self.save_dir, args=deepcopy(self.args))
        validator.device, validator.data = self.device, self.data
        validator.args.quantize = 16 if self.amp and self.device.type == "cuda" else None  # autocast
        return validator

    def forward(
        self, model: Any, batch: dict[str, Any], beside: FurtherLoss | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`loss_of` a model for a batch of the loader. Does not wait for the GPU."""
        batch = self.preprocess_batch(batch)
        with autocast(self.amp, device=self.device.type):
            return loss_of(model, batch, beside)

    def score(self, held_out: HeldOut) -> dict[str, dict[str, float]]:
        """The numbers of Ultralytics' validator by set of weights; AP is that of the one2one head, losses are val/*."""
        meter = Meter(f"{self.config.label} validation", len(self.test_loader), "batches")
        try:
            with without_one2many(held_out.model) if is_installed(held_out) else nullcontext():
                return self.validator.score(held_out, meter.update)
        finally:
            meter.close()

    def reestimate(self, model: nn.Module, images: list[torch.Tensor], replays: bool) -> None:
        """Re-estimates BatchNorm's statistics of a model, in place.

        Args:
            images: batches as a loader gives them, uint8 [N,3,H,W].
            replays: the forward is a CUDA graph.
        """
        on_gpu = self.device.type == "cuda"
        work = reestimate_by_replay if replays else reestimate_batchnorm
        meter = Meter(f"{self.config.label} BatchNorm", len(images), "batches")
        batches = counted(pinned_ahead(images) if on_gpu else images, meter)
        with autocast(self.amp, device=self.device.type):
            work(model, map(self._scaled, batches))

    def _scaled(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images to the device, scaled to 0..1; on a GPU in the type and layout of the first convolution."""
        if self.device.type == "cpu":
            return images / 255
        images = images.to(self.device, non_blocking=True)
        return torch.div(images, 255.0, out=unwritten_inputs(images.shape, self.device, self.amp))

    def read_from(self, epoch: int, batch: int) -> None:
        """The train loader begins anew at a batch of an epoch, both counted from 0."""
        self.train_loader.batch_sampler.sampler.start(epoch, batch)
        self.train_loader.reset()

    def extra_epoch(self) -> Iterator[dict[str, Any]]:
        """Batches of the epoch after the last one, augmented as that was, for rank 0 alone.

        They are as large as a rank's part of a batch: more may not fit on its GPU.
        """
        self.train_loader.close()
        if self.args.close_mosaic:
            self._close_dataloader_mosaic()  # a process that has resumed after the last epoch has not done it yet
        dataset = copy(self.train_loader.dataset)
        dataset.batch_size = -(-self.train_loader.batch_size // self.ranks.n)
        loader = train_loader(dataset, self.args.workers, self.device.type == "cuda", Place(self.epochs, 0))
        yield from track(loader, "correction", len(loader), "batches")
        loader.close()

    def close(self) -> None:
        """Ends the loader processes."""
        self.train_loader.close()
        self.test_loader.close()


def ultralytics_args(config: Config, run: RunRoot, device: str) -> dict[str, Any]:
    """Arguments of our trainer."""
    return {
        "data": str(run.dataset_yaml.resolve()),
        "save_dir": str(run.variant_dir(config.label).resolve()),
        "verbose": False,
        **recipe_args(config, device),
    }


def recipe_args(config: Config, device: str) -> dict[str, Any]:
    """Arguments of any of Ultralytics' trainers for a recipe. nms=False makes it validate the one2one head."""
    train = config.train
    return {
        "model": config.model,
        "epochs": train.epochs,
        "batch": train.batch,
        "imgsz": train.imgsz,
        "seed": train.seed,
        "deterministic": train.deterministic,
        "amp": train.amp,
        "workers": train.workers,
        "device": device,
        "cache": "ram" if train.cache else False,
        "pretrained": False,
        "nms": False,
        "patience": 0,
        "plots": False,
        "exist_ok": True,
        **config.hyp.model_dump(),
    }
