"""pycocotools' COCOeval, with a short way where an image has no object of the class."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

_Untyped: Any = COCOeval  # its stubs lack _gts and _dts


class Matcher(_Untyped):
    """COCOeval with the same results, several times faster on a detector's 300 boxes an image.

    On COCO val2017 an image has objects of 3 classes and detections of up to 80. Where it has no object of a class,
    every detection of it is false at every IoU, and nothing has to be matched.
    """

    def computeIoU(self, imgId: int, catId: int) -> Any:
        return super().computeIoU(imgId, catId) if self._gts[imgId, catId] else []

    def evaluateImg(self, imgId: int, catId: int, aRng: list[float], maxDet: int) -> dict[str, Any] | None:
        """One image, class and range of areas; what pycocotools 2.0.11 gives, in the keys that `accumulate` reads."""
        if self._gts[imgId, catId]:
            return super().evaluateImg(imgId, catId, aRng, maxDet)
        found = self._dts[imgId, catId]
        if not found:
            return None
        best_first = sorted(found, key=_descending)[:maxDet]
        n_ious = len(self.params.iouThrs)
        is_outside = np.array([[not aRng[0] <= detection["area"] <= aRng[1] for detection in best_first]])
        return {
            "image_id": imgId,
            "dtMatches": np.zeros((n_ious, len(best_first))),
            "dtScores": [detection["score"] for detection in best_first],
            "gtIgnore": np.zeros(0),
            "dtIgnore": is_outside.repeat(n_ious, axis=0),
        }


def _descending(detection: dict[str, Any]) -> float:
    return -detection["score"]
