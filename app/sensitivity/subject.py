"""What the stage works on: the trained FP16 network of a run, and the images that it is measured on."""

from __future__ import annotations

import logging
from typing import Any

import torch
from ultralytics.cfg import get_cfg

from app.core.config import Config
from app.core.files import sha256
from app.core.labels import FP16
from app.core.run import RunRoot
from app.data.prepare import prepared
from app.quant.model import load_scored, names_of
from app.sensitivity.batchnorm import corrections
from app.sensitivity.changes import Change
from app.sensitivity.images import Chosen, ValImages, bn_batches, choose
from app.sensitivity.measure import Probe
from app.sensitivity.network import Graph
from app.train.device import check_devices
from app.train.done import images_now
from app.train.processes import ALONE
from app.train.step import criterion_of_part

SEARCHED = ("measure", "against")  # settings of a proposal, which change no measurement
log = logging.getLogger(__name__)


class Subject:
    """The network of a run and the images that it is measured on."""

    def __init__(self, config: Config, run: RunRoot) -> None:
        source = run.finished(FP16)
        self.run = run
        self.provenance = prepared(run, config.data.coco_dir)
        self.model, trained, self.checkpoint = load_scored(source)
        update = {"sensitivity": config.sensitivity, "eval": config.eval}
        self.config = trained.model_copy(update=update)
        name = check_devices(config)[0]
        self.device = torch.device("cpu" if name == "cpu" else f"cuda:{name}")
        torch.backends.cudnn.allow_tf32 = False  # its rounding is larger than what 8 bits change
        net: Any = self.model
        net.to(self.device, memory_format=torch.channels_last)
        net.args = get_cfg(overrides=config.hyp.model_dump())
        self.graph, self.criterion = Graph(net), criterion_of_part(net, ALONE)
        self.images = ValImages(self.provenance, names_of(self.checkpoint), trained.train.imgsz, self.device)
        settings = config.sensitivity
        self.chosen: Chosen = choose(len(self.images.all), settings.images, settings.choice_seed)
        self.key = {
            "checkpoint_sha256": sha256(source),
            "settings": settings.model_dump(mode="json", exclude=set(SEARCHED)),
            "images": images_now(run),
        }

    def probe(self, changes: list[Change]) -> Probe:
        """A probe of changes, whose BatchNorm is re-estimated on train images."""
        log.info("sensitivity: BatchNorm of %d changes on train images", len(changes))
        train_images = bn_batches(self.config, self.run, self.checkpoint["epoch"], self.device)
        return Probe(self.graph, self.criterion, corrections(self.graph, changes, train_images))
