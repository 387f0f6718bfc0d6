"""Bytes that a network's convolutions take in its ONNX files under a scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from ultralytics.nn.tasks import DetectionModel

from app.core.labels import PACKED_BITS
from app.core.scheme import FLOAT, Rule, Scheme
from app.quant.schemes import assign, convolutions

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Layer:
    """A convolution under a scheme. `is_in_file` is False for the one2many head, which only the training has."""

    name: str
    conv: nn.Conv2d
    rule: Rule
    is_in_file: bool

    @property
    def n_weights(self) -> int:
        return self.conv.weight.numel()

    @property
    def n_scales(self) -> int:
        if self.rule.bits == FLOAT:
            return 0
        return self.conv.out_channels if self.rule.granularity == "channel" else 1

    def n_bytes(self, packs: bool) -> int:
        """Bytes of codes and scales in the file; with `packs` two codes of up to 4 bits share a byte."""
        if not self.is_in_file:
            return 0
        if self.rule.bits == FLOAT:
            return self.n_weights * FLOAT_BYTES
        is_packed = packs and int(self.rule.bits) <= PACKED_BITS
        n_code_bytes = (self.n_weights + 1) // 2 if is_packed else self.n_weights
        return n_code_bytes + self.n_scales * FLOAT_BYTES


def layers_of(model: DetectionModel, scheme: Scheme) -> list[Layer]:
    convs = convolutions(model)
    head = f"model.{len(cast(nn.Sequential, model.model)) - 1}."
    of_training = (f"{head}cv2.", f"{head}cv3.")
    rules = assign(list(convs), scheme)
    return [Layer(name, convs[name], rule, not name.startswith(of_training)) for name, rule in rules.items()]
