"""Labels: short names for the models of a run. This file alone formats and parses them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

FOREIGN = "foreign"  # method of a label in another format: the ONNX file of another project may have any label
DISTILLED = "-distilled"  # ends the scheme in the label of a QAT training with quant.distill, which is another recipe
SCORES_ENDING = "-coco"  # ends the names of folders that hold a metrics.json
_ENDINGS = r"(?:-(?P<packing>{packing}))?(?:-(?P<contract>end2end))?"
_FLOAT = re.compile(r"(?P<method>fp16)|(?P<file>baseline)" + _ENDINGS.format(packing="fp16"))
_QUANTIZED = re.compile(r"(?P<method>qat|ptq)-(?P<scheme>[\w.-]+?)(?P<bn>-bn)?" + _ENDINGS.format(packing="int4"))
_TODAY = {  # what files and scores were called in older runs -> what they are called
    "fp16": "baseline", "fp16-half": "baseline-fp16",
    "fp16-end2end": "baseline-end2end", "fp16-half-end2end": "baseline-fp16-end2end",
    "baseline-half": "baseline-fp16", "baseline-half-end2end": "baseline-fp16-end2end",
}  # fmt: skip
PACKED_BITS = 4  # codes of up to so many bits are stored two a byte in an INT4 file


@dataclass(frozen=True)
class Label:
    """A model of a run: how its weights were made, and the format of its file.

    A checkpoint is written as its folder: fp16, qat-w4a16 or ptq-w4a16-bn. The ONNX file traced from it has the same
    label, but that of fp16 is `baseline`: fp16 is the training alone. A repacked file has the ending -fp16 or -int4, a
    file of the end2end contract the ending -end2end: baseline-fp16, qat-w4a16-int4-end2end.
    """

    method: str  # fp16, baseline, qat or ptq; or FOREIGN, and then `scheme` holds the whole text of the label
    scheme: str = ""  # empty for fp16 and baseline
    bn: bool = False  # PTQ whose BatchNorm statistics were re-estimated after the weights were quantized
    packing: str = ""  # fp16 or int4: the weights of another file in a smaller format
    contract: str = "raw"  # or end2end

    @staticmethod
    def parse(text: str) -> Label:
        """The label with this text; `str` of it returns the same text, for a foreign label too."""
        match = _FLOAT.fullmatch(text) or _QUANTIZED.fullmatch(text)
        if match is None:
            return Label(FOREIGN, text)
        parts = match.groupdict(default="")
        method, has_bn = parts["method"] or "baseline", bool(parts.get("bn"))
        return Label(method, parts.get("scheme", ""), has_bn, parts["packing"], parts["contract"] or "raw")

    def __str__(self) -> str:
        if self.method == FOREIGN:
            return self.scheme
        return _join(self.method, self.scheme, "bn" if self.bn else "", self.packing, self._contract_ending)

    @property
    def _contract_ending(self) -> str:
        return "" if self.contract == "raw" else self.contract

    @property
    def is_quantized(self) -> bool:
        return self.method in ("qat", "ptq")

    @property
    def base_scheme(self) -> str:
        """The scheme without the ending of a distilled training: the weights of both are quantized alike."""
        return self.scheme.removesuffix(DISTILLED)

    @property
    def is_repacked(self) -> bool:
        """Whether the file has the weights of the traced file, in a smaller format or with another contract."""
        return bool(self.packing) or self.contract != "raw"

    @property
    def checkpoint(self) -> Label:
        """The label of the checkpoint from which the file was made."""
        method = "fp16" if self.method == "baseline" else self.method
        return replace(self, method=method, packing="", contract="raw")

    @property
    def traced(self) -> Label:
        """The label of the file that is traced from this checkpoint."""
        return replace(self, method="baseline") if self.method == "fp16" else self

    @property
    def precision(self) -> str:
        """Format of the weights in the ONNX file: fp32, fp16, qcdq or int4."""
        return self.packing or ("qcdq" if self.is_quantized else "fp32")

    @property
    def scores_dir(self) -> str:
        """Name of the folder with the scores of a file: baseline-coco, baseline-fp16-coco, qat-w4a16-coco."""
        return f"{self}{SCORES_ENDING}"

    def file_name(self, model: str) -> str:
        """Name of the ONNX file; `model` is e.g. 'yolov10m'.

        yolov10m-baseline-fp32.onnx, yolov10m-w4a16-qcdq-qat.onnx, yolov10m-w4a16-qcdq-ptq-bn.onnx; the end2end contract
        adds -end2end.
        """
        weights = self.scheme if self.is_quantized else self.method
        method = self.method if self.is_quantized else ""
        bn = "bn" if self.bn else ""
        return _join(model, weights, self.precision, method, bn, self._contract_ending) + ".onnx"

    @property
    def order(self) -> tuple[bool, bool, str, str]:
        """Sort key: fp16 or baseline first, then the schemes, each with PTQ before QAT; foreign labels last."""
        return self.method == FOREIGN, self.is_quantized, self.scheme, str(self)


def _join(*parts: str) -> str:
    return "-".join(part for part in parts if part)


FP16 = Label("fp16")  # the training
BASELINE = FP16.traced  # its file, and the scores of that


def by_label(text: str) -> tuple[bool, bool, str, str]:
    """Sort key for labels that are given as text."""
    return Label.parse(text).order


def today(text: str) -> str:
    """The label of a file, or of a folder of scores without its ending, as it is written today."""
    return _TODAY.get(text, text)


def scored_name(scores_dir: str) -> str:
    """Label of a folder of scores: 'baseline-coco' -> 'baseline'."""
    return today(scores_dir.removesuffix(SCORES_ENDING))
