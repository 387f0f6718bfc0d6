"""Weights of a checkpoint for a network of ours: whether they fit it, and how their classes are placed."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import torch
from ultralytics.nn.tasks import DetectionModel

from app.core.config import MODELS, UserError
from app.core.start import Start

CLASS_LAYERS = re.compile(r"model\.\d+\.(one2one_)?cv3\..*")  # of v10Detect, both heads
CLASS_ROWS = re.compile(r"model\.\d+\.(one2one_)?cv3\.\d+\.2\.(weight|bias)")  # of these the last: a row for each class
ONE2ONE_BIAS = re.compile(r"model\.\d+\.one2one_cv3\.0\.2\.bias")
FIRST = "model.0.conv.weight"
N_SHOWN = 3  # names in a message
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds of a network, under the names of DetectionModel's state_dict.

    `names` are its classes; `imgsz` the size in px that it was trained at; `architecture` the file that describes it,
    by its own word. Each is None where the checkpoint does not say it.
    """

    start: Start
    tensors: dict[str, torch.Tensor]
    names: list[str] | None = None
    imgsz: int | None = None
    architecture: str | None = None
    is_quantized: bool = False

    @property
    def n_classes(self) -> int:
        """Number of classes of the one2one head.

        Raises:
            UserError: it has none: no YOLOv10.
        """
        biases = [tensor for name, tensor in self.tensors.items() if ONE2ONE_BIAS.fullmatch(name)]
        if not biases or biases[0].ndim != 1:
            raise UserError(f"{self.start.path} holds no YOLOv10{self._by_its_word}: it has no one2one head")
        return len(biases[0])

    @property
    def _by_its_word(self) -> str:
        return f" but {self.architecture}" if self.architecture else ""


def without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under DetectionModel's names, whatever stands before these: 'module.', 'model.', nothing at all."""
    if FIRST not in tensors and FIRST.removeprefix("model.") in tensors:  # of the layers alone
        return {f"model.{name}": tensor for name, tensor in tensors.items()}
    prefixes = [name.removesuffix(FIRST) for name in tensors if name.endswith(FIRST)]
    if not prefixes:
        return tensors
    prefix = min(prefixes, key=len)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def fit(network: DetectionModel, weights: Weights, model: str) -> None:
    """Loads weights into a float network; class layers of another number of classes keep their random numbers.

    Args:
        network: with its classes in `names`.
        model: its architecture file, for the message.

    Raises:
        UserError: they are those of another architecture or size.
    """
    own = network.state_dict()
    wanted, given = list(network.names.values()), weights.n_classes
    misshaped = misfits(own, weights)
    if misshaped is None or (misshaped and given == len(wanted)):
        raise UserError(f"{weights.start.path} holds {other_network(weights, model)}")
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name in own and name not in misshaped}
    if misshaped:
        log.info(
            "%s has %d classes, the dataset %d: %d tensors of the head's class layers begin with random numbers",
            weights.start.name, given, len(wanted), len(misshaped),
        )  # fmt: skip
    else:
        tensors |= _placed(tensors, weights, wanted)
    network.load_state_dict({**own, **tensors})


def misfits(own: dict[str, torch.Tensor], weights: Weights) -> list[str] | None:
    """Names of class layers that have another shape; None where anything else differs: another architecture."""
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    if own.keys() != shapes.keys():
        return None
    differ = [name for name, tensor in own.items() if tensor.shape != shapes[name]]
    return differ if all(map(CLASS_LAYERS.fullmatch, differ)) else None


def other_network(weights: Weights, wanted: str) -> str:
    """What a checkpoint holds in place of the network `wanted`, and the remedy, for a message."""
    model = architecture_of(weights)
    if model:
        return f"{_stem(model)}, not {_stem(wanted)}: take --set model={model}"
    networks = ", ".join(map(_stem, MODELS))
    return f"no YOLOv10 but {weights.architecture or 'another network'}: the networks here are {networks}"


def architecture_of(weights: Weights) -> str | None:
    """The architecture file whose network the tensors fit exactly; None where there is none."""
    n_classes = weights.n_classes
    for model in sorted(MODELS, key=lambda model: model != weights.architecture):
        network = DetectionModel(model, ch=3, nc=n_classes, verbose=False)
        if misfits(network.state_dict(), weights) == []:
            return model
    return None


def _stem(model: str) -> str:
    return model.removesuffix(".yaml")


def _placed(tensors: dict[str, torch.Tensor], weights: Weights, wanted: list[str]) -> dict[str, torch.Tensor]:
    """The rows of the classes in the order of `wanted`, where these are the same classes in another order."""
    names, file = weights.names, weights.start.name
    if names is None or names == wanted:
        return {}
    if sorted(names) != sorted(wanted):
        others = [name for name in names if name not in wanted]
        log.warning(
            "%s has classes of other names (%s): each is taken for the one in its place in the dataset",
            file, ", ".join(others[:N_SHOWN]),
        )  # fmt: skip
        return {}
    log.info("%s has the classes in another order: its rows are put in that of the dataset", file)
    order = [names.index(name) for name in wanted]
    return {name: tensor[order] for name, tensor in tensors.items() if CLASS_ROWS.fullmatch(name)}


def not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """The first tensor with a NaN or an infinity; None where there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return None
