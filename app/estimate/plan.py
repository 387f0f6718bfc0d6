"""How large the pieces of the job are that are measured, so that they fit into the time.

On a GPU they are the job's own. Without one a step of the job may take minutes: a probe, two steps on one image of
PROBE_PX, says how fast the machine is now, and side, batch and val images are chosen by it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from app.core.config import Config
from app.core.run import Images
from app.export.done import N_PARITY_IMAGES

PROBE_PX = 160  # side; below it a network's deep maps are so small that its cost does not grow with the pixels
STEPS_OF_A_TRAINING = 10  # of the smaller batch, that its share must hold: steps, validation and BatchNorm, twice
VAL_SHARE = 0.5  # of a training's share, for one validation
VAL_STEPS = 1.2  # what three states of a val image cost, in steps of an image
N_TRAIN_BATCHES, N_TRAIN_BATCHES_GPU = 4, 24
N_TRAIN = 64  # train images at least: what is read first is decoded for mosaic too
N_VAL_GPU, N_VAL = 256, 64  # at most
N_BN_IMAGES = 16  # at least, on a CPU
SAMPLE, SAMPLE_GPU = Images(512, 128), Images(2048, 256)  # of a dataset that no run has looked at yet
log = logging.getLogger(__name__)

# What is switched off: it costs the same in no time, or would end the pilot. The pilot's network detects nothing; the
# last two of eval give it as many detections as a trained one has, which are some 30 to 300 an image.
OFF = (
    "train.save_period=0", "train.val_every=1", "report.min_ap50=null", "guard.collapse=warn", "guard.divergence=warn",
    "quant.warmup_from=null", "quant.warmup_share=0", "quant.correction_epochs=0", "eval.max_images=null",
    "eval.latency_warmup=1", "eval.latency_runs=10", "eval.conf=0", "eval.max_det=100",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        imgsz: px; batch: images of a step of one process; images: of the pilot; n_processes: of a training of the job.
        exports_as_job: whether files are compared with PyTorch on images as many and as large as the job's.
    """

    imgsz: int
    batch: int
    images: Images
    n_bn_batches: int
    exports_as_job: bool
    n_processes: int = 1

    def sets(self) -> list[str]:
        """Settings of the pilot."""
        return [
            f"train.imgsz={self.imgsz}", f"train.batch={self.batch}", f"train.bn_batches={self.n_bn_batches}",
            f"data.n_train={self.images.train}", f"data.n_val={self.images.val}", *OFF,
        ]  # fmt: skip


def plan_for_gpu(config: Config, images: Images, n_processes: int) -> Plan:
    """The job's own sizes; `images` are those that are there."""
    train = config.train
    batch = min(-(-train.batch // n_processes), images.train)
    n_train = min(batch * N_TRAIN_BATCHES_GPU, images.train)
    n_val = min(max(2 * batch, 16), N_VAL_GPU, images.val)
    return Plan(train.imgsz, batch, Images(n_train, n_val), min(train.bn_batches, 8), True, n_processes)


def plan_for_cpu(config: Config, images: Images, px_s: float, share_s: float) -> Plan:
    """The largest sizes whose training, steps and two validations, is over within its share.

    Args:
        images: those that are there.
        px_s: seconds of a step by the pixels of its images, as the probe has it.
        share_s: seconds that one training may take.
    """
    train = config.train
    smallest = min(train.imgsz, PROBE_PX)
    sides = [side for side in _sides(train.imgsz) if side >= smallest]
    fitting = (side for side in sides if STEPS_OF_A_TRAINING * side**2 * px_s <= share_s)
    side = next(fitting, sides[-1])
    image_s = side**2 * px_s
    n_affordable = max(int(2 * share_s / (STEPS_OF_A_TRAINING * image_s)), 1)
    batch = min(train.batch, images.train, max(n_affordable, 2))
    n_val = min(max(int(VAL_SHARE * share_s / (VAL_STEPS * image_s)), 2), N_VAL, images.val)
    n_train = min(max(N_TRAIN_BATCHES * batch, N_TRAIN), images.train)
    exports_as_job = side == train.imgsz and n_val >= min(N_PARITY_IMAGES, images.val)
    n_bn = min(train.bn_batches, max(-(-N_BN_IMAGES // batch), 1), max(n_affordable // batch, 1))
    return Plan(side, batch, Images(n_train - n_train % batch, n_val), n_bn, exports_as_job)


def _sides(imgsz: int) -> list[int]:
    """imgsz and its halves, each a multiple of 32, down to PROBE_PX."""
    sides = [imgsz]
    while sides[-1] // 2 >= PROBE_PX:
        sides.append(sides[-1] // 2 // 32 * 32)
    return sides
