"""What a training died of, in the user's words where the user can mend it."""

from __future__ import annotations

import torch

from app.config import Config, UserError
from app.training.ranks import explain_lost_peer


def explain(error: RuntimeError, config: Config) -> None:
    """Returns where `error` is none of these.

    Raises:
        PeerLost: another process of this training has gone.
        UserError: too little GPU memory, or a loader process that died or hangs.
    """
    explain_lost_peer(error)
    t = config.train
    if isinstance(error, torch.OutOfMemoryError):
        raise UserError(
            f"train.batch={t.batch} at {t.imgsz} px does not fit in GPU memory: set train.batch={t.batch // 2}; "
            f"gradients still accumulate to {config.hyp.nbs} images a step"
        ) from error
    if str(error).startswith("DataLoader"):  # not one that only passes on an error of our own
        raise UserError(
            f"a loader process died or hangs ({str(error).splitlines()[0]}): memory or shared memory may be short; "
            "lower train.workers, or start the container with a larger SHM_SIZE"
        ) from error
