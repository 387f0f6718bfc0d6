"""What the pieces of the job cost, as they are measured: the numbers from which the price is computed."""

from __future__ import annotations

from dataclasses import dataclass

from app.core.labels import Label
from app.estimate.cost import Cost, Line


@dataclass(frozen=True)
class TrainingCosts:
    """Of one process of a training.

    Attributes:
        start: network, loaders, optimizer, first checkpoint; labels: of it, those of a train image.
        decode: reads and scales an image; augment: makes a sample of decoded images.
        loader: a sample from the loader processes, all of them at work: seconds between two samples, and those of the
            processor to make one; None: the process makes its samples itself.
        step: forward, loss and backward of a batch, by its pixels; optimizer: a step of the optimizer, with the EMA.
        draw: the images of BatchNorm, each; reestimate: a batch of them through the network, by its pixels.
        validation: what does not grow with the images; val_px: a pixel of a val image in three states, without its
            reading where the process reads it itself.
        checkpoint: last.pt; end: loss curve and hashes.
        process_bytes: of the process and its loader processes at the plan's batch.
        gpu_bytes: peak on the GPU at the plan's batch, and what was there before the first step; None without a GPU.
    """

    start: Cost
    labels: Cost
    decode: Cost
    augment: Cost
    loader: Cost | None
    step: Line
    optimizer: Cost
    draw: Cost
    reestimate: Line
    validation: Cost
    val_px: Cost
    checkpoint: Cost
    end: Cost
    process_bytes: int
    gpu_bytes: tuple[int, int] | None = None


@dataclass(frozen=True)
class CheckpointCosts:
    """Of the export of a checkpoint: read, and computed with PyTorch on images, by their pixels."""

    read: Cost
    truth: Line


@dataclass(frozen=True)
class FileCosts:
    """Of an ONNX file: written without its gates; its gates, by the pixels of their images."""

    write: Cost
    gates: Line


@dataclass(frozen=True)
class ScoreCosts:
    """Of the score of an ONNX file: what it costs once; a pixel of a val image in ONNX Runtime, and the rest of an
    image; a pixel of a timed run, and the rest of a run."""

    start: Cost
    image_px: Cost
    image: Cost
    run_px: Cost
    run: Cost


Kind = tuple[bool, bool]  # of a file: is it quantized, is it repacked


def kind_of(label: Label) -> Kind:
    return label.is_quantized, bool(label.packing)


@dataclass(frozen=True)
class AfterCosts:
    """Of the stages after the trainings.

    Attributes:
        ptq: without BatchNorm.
        checkpoints: by whether they are quantized.
        files, scores: by kind.
        report: without the analysis; analysis: of it, an image of a file.
    """

    ptq: Cost
    checkpoints: dict[bool, CheckpointCosts]
    files: dict[Kind, FileCosts]
    scores: dict[Kind, ScoreCosts]
    report: Cost
    analysis: Cost
