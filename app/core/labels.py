"""Labels: what a model of a run is, in one word. This file alone writes these words and takes them apart."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

FOREIGN = "foreign"  # method of a label that is none of ours: an ONNX file from elsewhere may have any
SCORES_ENDING = "-coco"  # of the folders that hold a metrics.json
_ENDINGS = r"(?:-(?P<packing>{packing}))?(?:-(?P<contract>end2end))?"
_FLOAT = re.compile(r"(?P<method>fp16)" + _ENDINGS.format(packing="half"))
_QUANTIZED = re.compile(r"(?P<method>qat|ptq)-(?P<scheme>[\w.-]+?)(?P<bn>-bn)?" + _ENDINGS.format(packing="int4"))
_PACKED_PRECISIONS = {"half": "fp16", "int4": "int4"}


@dataclass(frozen=True)
class Label:
    """A model of a run: how its weights were made, and how its file holds them.

    Written as fp16, qat-w4a16 or ptq-w4a16-bn for a checkpoint and for the file that is traced from it; repacked files
    add -half or -int4, files of the other contract -end2end: qat-w4a16-int4-end2end.
    """

    method: str  # fp16, qat or ptq; FOREIGN for a label that is not ours, whose whole text is then in `scheme`
    scheme: str = ""  # empty for fp16
    bn: bool = False  # PTQ whose BatchNorm statistics were re-estimated after the weights were quantized
    packing: str = ""  # half or int4: the weights of another file in a smaller format
    contract: str = "raw"  # or end2end

    @staticmethod
    def parse(text: str) -> Label:
        """The label that is written so; `str` of it gives the text again, that of a foreign label too."""
        match = _FLOAT.fullmatch(text) or _QUANTIZED.fullmatch(text)
        if match is None:
            return Label(FOREIGN, text)
        parts = match.groupdict(default="")
        has_bn = bool(parts.get("bn"))
        return Label(parts["method"], parts.get("scheme", ""), has_bn, parts["packing"], parts["contract"] or "raw")

    def __str__(self) -> str:
        if self.method == FOREIGN:
            return self.scheme
        return "-".join([self.method, *([self.scheme] if self.scheme else []), *self._endings])

    @property
    def _endings(self) -> list[str]:
        contract = "" if self.contract == "raw" else self.contract
        return [ending for ending in ("bn" if self.bn else "", self.packing, contract) if ending]

    @property
    def is_quantized(self) -> bool:
        return self.method in ("qat", "ptq")

    @property
    def is_repacked(self) -> bool:
        """Whether the file holds the weights of another one, in another format or behind another contract."""
        return self != self.checkpoint

    @property
    def checkpoint(self) -> Label:
        """The checkpoint that the file was made of."""
        return replace(self, packing="", contract="raw")

    @property
    def precision(self) -> str:
        """Format of the weights in the ONNX file: fp32, fp16, qcdq or int4."""
        if self.packing:
            return _PACKED_PRECISIONS[self.packing]
        return "qcdq" if self.is_quantized else "fp32"

    @property
    def scores_dir(self) -> str:
        """Name of the folder that holds the scores: baseline-coco, baseline-half-coco, qat-w4a16-coco."""
        name = "-".join(["baseline", *self._endings]) if self.method == "fp16" else str(self)
        return name + SCORES_ENDING

    def file_name(self, model: str) -> str:
        """yolov10m-baseline-fp32.onnx, yolov10m-w4a16-qcdq-qat.onnx, yolov10m-w4a16-qcdq-ptq-bn.onnx for the model
        'yolov10m'; files of the end2end contract end in -end2end."""
        made = [self.scheme, self.precision, self.method] if self.is_quantized else ["baseline", self.precision]
        ending = ["bn"] if self.bn else []
        contract = [] if self.contract == "raw" else [self.contract]
        return "-".join([model, *made, *ending, *contract]) + ".onnx"

    @property
    def order(self) -> tuple[bool, bool, str, str]:
        """Sort key: fp16 first, then scheme by scheme, of each PTQ before QAT; foreign labels last."""
        return self.method == FOREIGN, self.is_quantized, self.scheme, str(self)


BASELINE = Label("fp16")


def by_label(text: str) -> tuple[bool, bool, str, str]:
    """Sort key of labels that are still text."""
    return Label.parse(text).order


def scored_name(scores_dir: str) -> str:
    """Name of a folder of scores, as a column of a table is headed: 'baseline-coco' -> 'baseline'."""
    return scores_dir.removesuffix(SCORES_ENDING)
