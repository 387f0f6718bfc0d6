"""How much memory and time a training takes on a CPU, from measured steps of one image; refuses what cannot be meant.

Memory beyond what the process has before it builds the network, in bytes:

    4 * parameters * (COPIES + QUANTIZED_COPIES for qat) + batch * saved * WORKSPACE + n_bn_images * 3 * imgsz^2

`saved` are the bytes of an image that autograd keeps from the forward pass for the backward pass, n_bn_images the
number of images that BatchNorm is re-estimated on: bn_batches * batch, or all. Time in seconds:

    epochs * (n_train * step + (3 * n_val + n_bn_images) / val_every * forward)

`step` are the seconds of forward, loss and backward of an image, `forward` those of the forward alone. Reading and
augmenting images is not in it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from ultralytics.cfg import get_cfg

from app.core.config import Config, UserError
from app.core.memory import available_bytes
from app.core.progress import DAY_S, clock
from app.core.results import STATES
from app.core.run import Images, RunRoot, images_of, n_bn_images
from app.quant.model import float_network
from app.train.processes import ALONE
from app.train.step import criterion_of_part

MEASURED_PX = 320  # side of the measured image; activations and time grow with the pixels, exactly and nearly
N_OBJECTS = 7  # in it, as in COCO's mean image
# Copies of the weights: network, gradient, momentum, EMA, scored, held out; and six of a checkpoint being written.
COPIES = 12
QUANTIZED_COPIES = 3  # of the weights, that autograd keeps of their quantization: 190 MiB for the 63 of YOLOv10m
# Gradients of activations and oneDNN's buffers: peaks of YOLOv10m were 1.10 of `saved` with 8 images of 320 px, 1.16
# with 4 of 640.
WORKSPACE = 1.2
LONG_DAYS = 7  # nobody waits a week without having meant to; a training of days only says so
# Below both, nothing is measured, as with the smoke: 1 GPx takes the largest model a day on a core of 20 GFLOP/s, and
# a batch of 1 MPx takes 2.5 GiB.
LIGHT_PX, LIGHT_BATCH_PX = 1e9, 1e6
GIB = 2**30
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """A network: number of parameters; of one image of train.imgsz: bytes kept for backward, and seconds.

    `step_cpu_s` are those of all cores.
    """

    parameters: int
    saved_bytes: float
    step_s: float
    forward_s: float
    step_cpu_s: float = 0.0


def check_affordable(config: Config, run: RunRoot, force: bool, accepted: bool) -> None:
    """Before a training on the CPU begins: says what it takes, where that is not little.

    Args:
        force: it begins anew; else what has begun before goes on unasked.
        accepted: it goes on with a warning, however much that is.

    Raises:
        UserError: it takes more memory than there is, or more than LONG_DAYS, and is not accepted.
    """
    images = images_of(run)
    has_begun = (run.variant_dir(config.label) / "weights" / "last.pt").exists()
    if (has_begun and not force) or is_light(config, images):
        return
    log.info("train %s: measures a step of one image, to say what the training takes without a GPU", config.label)
    judge(config, measure(config), images, available_bytes(), accepted)


def is_light(config: Config, images: Images) -> bool:
    """Whether a training is so small that it needs no measurement."""
    image_px = config.train.imgsz**2
    return images.train * config.train.epochs * image_px <= LIGHT_PX and config.train.batch * image_px <= LIGHT_BATCH_PX


def measure(config: Config, most_px: int | None = None) -> Measured:
    """Trains the float network on one image, twice, and times the second step; about 5 s for YOLOv10m on two cores.

    `most_px`: largest side of that image; None: MEASURED_PX.
    """
    side_px = min(config.train.imgsz, most_px or MEASURED_PX)
    scale = (config.train.imgsz / side_px) ** 2
    net: Any = float_network(config)
    net.args = cast(Any, get_cfg(overrides=config.hyp.model_dump()))
    net.criterion = criterion_of_part(net, ALONE)
    batch = one_image(side_px)
    _step(net, batch)  # the first one also allocates and compiles
    start_s = time.process_time()
    saved_bytes, step_s, forward_s = _step(net, batch)
    step_cpu_s = time.process_time() - start_s
    n_parameters = sum(parameter.numel() for parameter in net.parameters())
    return Measured(n_parameters, saved_bytes * scale, step_s * scale, forward_s * scale, step_cpu_s * scale)


def one_image(side_px: int) -> dict[str, torch.Tensor]:
    """A batch of one grey image with N_OBJECTS boxes."""
    places = torch.linspace(0.2, 0.8, N_OBJECTS)[:, None]
    return {
        "img": torch.full((1, 3, side_px, side_px), 0.5),
        "batch_idx": torch.zeros(N_OBJECTS),
        "cls": torch.zeros(N_OBJECTS, 1),
        "bboxes": torch.cat([places, places, torch.full((N_OBJECTS, 2), 0.2)], dim=1),
    }


def _step(net: Any, batch: dict[str, torch.Tensor]) -> tuple[int, float, float]:
    """Bytes that autograd kept, without the weights; seconds of the step, and of its forward."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = net(batch)
    forward_s = time.perf_counter() - start
    loss.sum().backward()
    return sum(sizes.values()), time.perf_counter() - start, forward_s


def memory_bytes(config: Config, measured: Measured, images: Images) -> float:
    """See the formula above."""
    copies = COPIES + (QUANTIZED_COPIES if config.quant else 0)
    activations = config.train.batch * measured.saved_bytes * WORKSPACE
    return 4 * measured.parameters * copies + activations + n_bn_images(config, images) * 3 * config.train.imgsz**2


def seconds(config: Config, measured: Measured, images: Images) -> float:
    """See the formula above."""
    train = config.train
    n_forward = (len(STATES) * images.val + n_bn_images(config, images)) / train.val_every
    return train.epochs * (images.train * measured.step_s + n_forward * measured.forward_s)


def judge(config: Config, measured: Measured, images: Images, available: int, accepted: bool) -> None:
    """Says what a training takes.

    Raises:
        UserError: it is too much for the machine or for a life, and not accepted.
    """
    need, duration_s = memory_bytes(config, measured, images), seconds(config, measured, images)
    fits, is_long = need <= available, duration_s > LONG_DAYS * DAY_S
    takes = f"about {need / GIB:.1f} GiB of memory ({available / GIB:.1f} are available) and {clock(duration_s)}"
    if fits and not is_long:
        log.info("train %s: takes %s without a GPU", config.label, takes)
    elif accepted:
        log.warning("train %s: takes %s without a GPU; goes on, as --yes says", config.label, takes)
    else:
        raise UserError(
            f'train {config.label}: without a GPU it takes {takes}: take smaller settings, for example ARGS="--set '
            f"model=yolov10n.yaml --set train.imgsz=320 --set train.batch=8 --set data.n_train=2000 --set "
            f'train.epochs=30", or a machine with a GPU; to go on all the same, ARGS=--yes'
        )
