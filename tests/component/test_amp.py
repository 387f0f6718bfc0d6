"""FP16 autocast that Ultralytics leaves out: nothing is trained in another precision than the configuration says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ultralytics.models.yolo.detect import DetectionTrainer

from app.core.config import UserError, load
from app.train import trainer as trainer_module
from app.train.processes import ALONE
from app.train.trainer import Trainer


@pytest.mark.parametrize(
    ("device", "asked", "passes", "is_refused"),
    [
        ("cuda", True, False, True),
        ("cuda", True, True, False),
        ("cuda", False, False, False),
        ("cpu", True, False, False),  # env.json says that a CPU trains without
    ],
)
def test_a_gpu_that_fails_the_check_of_autocast(
    monkeypatch: pytest.MonkeyPatch, device: str, asked: bool, passes: bool, is_refused: bool
) -> None:
    def set_up(self: Any) -> None:  # what Ultralytics' own leaves, which asks check_amp on a GPU
        self.amp, self.model, self.ema = asked and passes, SimpleNamespace(), SimpleNamespace()

    monkeypatch.setattr(DetectionTrainer, "_setup_train", set_up)
    monkeypatch.setattr(trainer_module, "criterion_of_part", lambda *_: None)
    trainer: Any = object.__new__(Trainer)
    trainer.device, trainer.ranks = torch.device(device), ALONE
    trainer.config = load("fp16", sets=[f"train.amp={asked}", "train.kernels=false"])
    if is_refused:
        with pytest.raises(UserError, match=r"train\.amp=true, but .* set train\.amp=false"):
            trainer.set_up()
    else:
        trainer.set_up()
