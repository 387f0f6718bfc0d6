"""The matching kernel in Triton's interpreter against Ultralytics' own matching, bit for bit, and what is made of it.

The interpreter has to be chosen before Triton is imported, so the test runs this file as a script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from ultralytics.cfg import get_cfg
from ultralytics.utils.ops import xyxy2xywh

from app.train.match import BLOCKS, match, targets_of
from app.train.validator import KernelValidator, Validator

SIDE_PX, N_DETECTIONS, CONFIDENCE = 64, 12, 0.001
NAMES = {0: "a", 1: "b", 2: "c"}
SETS = ["raw", "ema"]


def test_kernel_equals_ultralytics_in_the_interpreter() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
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


def labels_of(boxes: list[list[tuple[float, ...]]]) -> dict[str, torch.Tensor]:
    """Labels as a loader gives them for class and corners in px of the objects of each image."""
    rows = [(image, *row) for image, rows in enumerate(boxes) for row in rows]
    table = torch.tensor(rows).view(-1, 6)
    return {"batch_idx": table[:, 0], "cls": table[:, 1:2], "bboxes": xyxy2xywh(table[:, 2:]) / SIDE_PX}


def detections_of(rows: list[list[tuple[float, ...]]]) -> torch.Tensor:
    """Detections [N,D,6], without confidence where `rows` has none."""
    out = torch.zeros(len(rows), N_DETECTIONS, 6)
    for image, own in zip(out, rows, strict=True):
        for row, values in zip(image, own, strict=False):
            row.copy_(torch.tensor(values))
    return out


def bits_by_ultralytics(labels: dict[str, torch.Tensor], detections: torch.Tensor) -> list[list[int]]:
    """The matching of Ultralytics' validator, image by image, as bits; 0 for what its confidence rules out."""
    validator = new_validator(Validator)
    bits = []
    for number, own in enumerate(detections):
        pred = {"bboxes": own[:, :4], "conf": own[:, 4], "cls": own[:, 5]}
        kept = own[:, 4] > CONFIDENCE
        pred = {key: value[kept] for key, value in pred.items()}
        image = labels["batch_idx"] == number
        target = targets_of(
            {key: value[image] * (key != "batch_idx") for key, value in labels.items()}, 1, (SIDE_PX,) * 2
        )
        assert target
        prepared = {"cls": target.table[:, 0], "bboxes": target.table[:, 1:]}
        right = np.zeros((N_DETECTIONS, 10), bool)
        right[kept.numpy()] = validator._process_batch(pred, prepared)["tp"]
        bits.append((right << np.arange(10)).sum(1).tolist())
    return bits


def check(labels: dict[str, torch.Tensor], detections: torch.Tensor) -> list[list[int]]:
    targets = targets_of(labels, len(detections), (SIDE_PX, SIDE_PX))
    assert targets
    ours = match(detections, targets, torch.linspace(0.5, 0.95, 10), CONFIDENCE).tolist()
    assert ours == bits_by_ultralytics(labels, detections)
    return ours


def check_ties() -> None:
    """Equal objects, equal detections, an IoU of just a threshold, a better object that is taken, other classes."""
    box, half, low = (8.0, 8.0, 40.0, 40.0), (8.0, 8.0, 40.0, 24.0), (8.0, 8.0, 40.0, 36.0)
    every, none = 2**10 - 1, 0
    twins = [(1.0, *box), (1.0, *box)]
    nan = float("nan")
    cases: list[tuple[list[tuple[float, ...]], list[tuple[float, ...]], list[int]]] = [
        (twins, [(*box, 0.9, 1.0), (*box, 0.9, 1.0), (*box, 0.8, 1.0)], [every, every, none]),
        ([(1.0, *box), (1.0, *low)], [(*low, 0.9, 1.0), (*low, 0.8, 1.0), (*low, 0.7, 1.0)], [every, 2**8 - 1, none]),
        ([(1.0, *box)], [(*half, 0.9, 1.0), (*box, 0.8, 1.0)], [1, every - 1]),  # 0.5 and then what 0.5 leaves
        ([(1.0, *box)], [(*box, 0.9, 2.0), (*box, CONFIDENCE, 1.0), (*box, 0.1, 1.0)], [none, none, every]),
        ([(1.0, *box)], [(nan, *box[1:], 0.9, 1.0), (*box, nan, 1.0), (*box, 0.1, 1.0)], [none, none, every]),
        ([], [(*box, 0.9, 1.0)], [none]),
        ([(1.0, *box)], [], []),
    ]  # fmt: skip
    labels = labels_of([objects for objects, _, _ in cases])
    found = check(labels, detections_of([detections for _, detections, _ in cases]))
    for own, (_, detections, expected) in zip(found, cases, strict=True):
        assert own == expected + [none] * (N_DETECTIONS - len(detections))


def scene(generator: torch.Generator, counts: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random objects of few classes and sizes, and detections near them, some equal, in the order of confidence."""
    objects = []
    for count in counts:
        corners = torch.randint(0, 6, (count, 2), generator=generator) * 4.0
        sides = torch.randint(2, 6, (count, 2), generator=generator) * 4.0
        classes = torch.randint(0, len(NAMES), (count, 1), generator=generator).float()
        objects.append([tuple(row) for row in torch.cat([classes, corners, corners + sides], 1).tolist()])
    detections = torch.zeros(len(counts), N_DETECTIONS, 6)
    for own, rows in zip(detections, objects, strict=True):
        for at in range(N_DETECTIONS):
            if rows:
                pick = int(torch.randint(0, len(rows), (), generator=generator))
                shift = torch.randint(-1, 2, (4,), generator=generator) * 1.5
                own[at, :4] = torch.tensor(rows[pick][1:]) + shift
                own[at, 5] = rows[pick][0]
        own[:, 4] = torch.rand(N_DETECTIONS, generator=generator).sort(descending=True).values - 0.1
    return labels_of(objects), detections


def new_validator(kind: type[Validator]) -> Any:
    validator: Any = kind(SimpleNamespace(dataset=[]), args=get_cfg(overrides={"plots": False, "conf": CONFIDENCE}))
    validator.device, validator.data = torch.device("cpu"), {}
    validator.init_metrics(SimpleNamespace(names=NAMES, set_names=SETS, end2end=True))
    return validator


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
    counted = {}
    for name, metrics in validator.metrics_of.items():
        counted[name] = {key: np.concatenate(values) for key, values in metrics.stats.items()}
    return validator, counted, validator.get_stats()


def compare_validators() -> None:
    """Two sets of weights on batches of three, one and two images: what each counts, AP, pictures and images seen."""
    generator = torch.Generator().manual_seed(0)
    scenes = []
    for counts in ([5, 0, 9], [0], [70, 2]):
        labels, detections = scene(generator, counts)
        scenes.append((labels, {"raw": detections, "ema": detections.flip(0)}))
    ours, own, numbers = stats_of(KernelValidator, scenes)
    theirs, reference, expected = stats_of(Validator, scenes)
    assert numbers == expected
    assert max(numbers.values()) > 0.1
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
