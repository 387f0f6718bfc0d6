"""The matching kernel in Triton's interpreter against Ultralytics' own matching, bit for bit, and what is made of it.

The interpreter has to be chosen before Triton is imported, so the test runs this file as a script.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ultralytics.utils.metrics import DetMetrics

from app.train.match import BLOCKS, targets_of
from app.train.validator import KernelValidator, Validator
from tests.support.interpreter import run_in_interpreter
from tests.support.matching import (
    CONFIDENCE,
    SIDE_PX,
    bits_by_kernel,
    bits_by_ultralytics,
    detections_of,
    labels_of,
    new_validator,
    scene,
)

N_DETECTIONS = 12


def test_kernel_equals_ultralytics_in_the_interpreter() -> None:
    done = run_in_interpreter(__file__)
    assert done.returncode == 0, done.stderr


def test_targets_are_sorted_by_image_and_in_px() -> None:
    labels = {
        "batch_idx": torch.tensor([2.0, 0.0, 2.0]), "cls": torch.tensor([[5.0], [6.0], [7.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.25, 0.5, 0.5], [0.25, 0.5, 0.5, 1.0]]),
    }  # fmt: skip
    targets = targets_of(labels, 3, (32, 64))
    assert targets
    assert targets.starts.tolist() == [0, 1, 1, 3]
    assert targets.table.tolist() == [[6, 16, 0, 48, 16], [5, 16, 8, 48, 24], [7, 0, 0, 32, 32]]
    assert targets.block == BLOCKS[0]


def test_more_objects_than_the_kernel_takes_are_none() -> None:
    n = BLOCKS[1] + 1
    labels = {"batch_idx": torch.zeros(n), "cls": torch.zeros(n, 1), "bboxes": torch.rand(n, 4)}
    assert targets_of(labels, 1, (32, 32)) is None
    most = targets_of({key: value[1:] for key, value in labels.items()}, 1, (32, 32))
    assert most
    assert most.block == BLOCKS[1]


# --- the script ------------------------------------------------------------------------------------------------------


def check_ties() -> None:
    """Equal objects, equal detections, an IoU of just a threshold, a better object that is taken, other classes."""
    box, half, low = (8.0, 8.0, 40.0, 40.0), (8.0, 8.0, 40.0, 24.0), (8.0, 8.0, 40.0, 36.0)
    first, second, between = (0.0, 8.0, 32.0, 40.0), (12.0, 8.0, 44.0, 40.0), (6.0, 8.0, 38.0, 40.0)  # IoU 0.45, 0.68
    every, none = 2**10 - 1, 0
    twins = [(1.0, *box), (1.0, *box)]
    nan = float("nan")
    cases: list[tuple[list[tuple[float, ...]], list[tuple[float, ...]], list[int]]] = [
        (twins, [(*box, 0.9, 1.0), (*box, 0.9, 1.0), (*box, 0.8, 1.0)], [every, every, none]),
        ([(1.0, *box), (1.0, *low)], [(*low, 0.9, 1.0), (*low, 0.8, 1.0), (*low, 0.7, 1.0)], [every, 2**8 - 1, none]),
        ([(1.0, *box)], [(*half, 0.9, 1.0), (*box, 0.8, 1.0)], [1, every - 1]),  # 0.5 and then what 0.5 leaves
        ([(1.0, *first), (1.0, *second)], [(*between, 0.9, 1.0), (*first, 0.8, 1.0)], [15, every - 15]),
        ([(1.0, *box)], [(*box, 0.9, 2.0), (*box, CONFIDENCE, 1.0), (*box, 0.1, 1.0)], [none, none, every]),
        ([(1.0, *box)], [(nan, *box[1:], 0.9, 1.0), (*box, nan, 1.0), (*box, 0.1, 1.0)], [none, none, every]),
        ([], [(*box, 0.9, 1.0)], [none]),
        ([(1.0, *box)], [], []),
    ]  # fmt: skip
    labels = labels_of([objects for objects, _, _ in cases])
    detections = detections_of([rows for _, rows, _ in cases], N_DETECTIONS)
    found = bits_by_kernel(labels, detections)
    assert found == bits_by_ultralytics(labels, detections)
    for own, (_, _, expected) in zip(found, cases, strict=True):
        assert own == expected + [none] * (N_DETECTIONS - len(expected))


def stats_of(kind: type[Validator], scenes: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]) -> Any:
    """A validator after batches of given labels and outputs: itself, what it has counted, and its numbers."""
    validator = new_validator(kind)
    for number, (labels, outputs) in enumerate(scenes):
        n_images = len(outputs["raw"])
        images = torch.zeros(n_images, 3, SIDE_PX, SIDE_PX, dtype=torch.uint8)
        facts = {
            "ori_shape": [(SIDE_PX, SIDE_PX)] * n_images,
            "ratio_pad": [None] * n_images,
            "im_file": ["a"] * n_images,
        }
        batch = validator.preprocess({"img": images, **labels, **facts})
        validator.batch_i = number
        validator.update_metrics(validator.postprocess({name: (out, None) for name, out in outputs.items()}), batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetMetrics, "clear_stats", lambda self: None)
        numbers = validator.get_stats()
    counted = {}
    for name, metrics in validator.metrics_of.items():
        counted[name] = {key: np.concatenate(values) for key, values in metrics.stats.items()}
    return validator, counted, numbers


def compare_validators() -> None:
    """Two sets of weights on batches of three, one and two images: what each counts, AP, pictures and images seen."""
    generator = torch.Generator().manual_seed(0)
    scenes = []
    for counts in ([5, 0, 9], [0], [70, 2]):
        labels, detections = scene(generator, counts, N_DETECTIONS)
        scenes.append((labels, {"raw": detections, "ema": detections.flip(0)}))
    ours, own, numbers = stats_of(KernelValidator, scenes)
    theirs, reference, expected = stats_of(Validator, scenes)
    assert numbers == expected
    assert max(value for of_set in numbers.values() for value in of_set.values()) > 0.1
    assert ours.seen == theirs.seen == 6
    for name, stats in reference.items():
        for key, value in stats.items():
            both = (own[name][key], value) if "target" not in key else (np.sort(own[name][key]), np.sort(value))
            assert np.array_equal(*both), (name, key)
        assert ours.metrics_of[name].maps.tolist() == theirs.metrics_of[name].maps.tolist()
    for pred, wanted in zip(ours.first_batch[0], theirs.first_batch[0], strict=True):
        assert all(torch.equal(pred[key], wanted[key]) for key in wanted)


if __name__ == "__main__":
    check_ties()
    compare_validators()
