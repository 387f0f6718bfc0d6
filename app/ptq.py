"""PTQ: the trained FP16 baseline, quantized without training, so that the report shows what QAT buys over it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn.tasks import DetectionModel

from app.coco import NAMES
from app.config import Config, Export, Quant, UserError
from app.device import check_device
from app.export import (
    METADATA,
    Trained,
    check,
    describe,
    file_settings,
    is_done,
    make_graph,
    one_head,
    parity_images,
    quantized_layers,
    torch_truth,
    write_overview,
)
from app.loader import BN_EPOCH, CocoDataset, train_loader
from app.model import load_scored, save_checkpoint, scored_state
from app.onnx_files import set_facts
from app.progress import track
from app.quant.schemes import quantize
from app.quant.stabilise import reestimate_batchnorm
from app.run import RunRoot, read_json, record_stage, sha256, write_atomic, write_json

log = logging.getLogger(__name__)
KIND = ("qcdq", "raw")  # precision and contract of the files


def ptq(config: Config, run: RunRoot, force: bool) -> None:
    """Quantizes runs/<name>/fp16 with the abs-max quantizers of quant.scheme: once as it is (label ptq-<scheme>), once
    with BatchNorm re-estimated afterwards (ptq-<scheme>-bn). Writes <label>/weights/best.pt and onnx/...ptq[-bn].onnx.

    Raises:
        UserError: no trained FP16 baseline, or files of another checkpoint or other settings without `force`.
        RuntimeError: a gate of the export failed; the file was not written.
    """
    if config.quant is None:
        raise UserError("ptq takes the scheme from quant.scheme: give it the configuration of a qat variant")
    source_path = run.variant_dir("fp16") / "weights" / "best.pt"
    model, trained, checkpoint = load_scored(source_path)
    quant = Quant(scheme=config.quant.scheme, fast_path=False)
    quant_config = quantize(model, quant)
    wanted = {"source_sha256": sha256(source_path), "export": file_settings(config.export)}
    quantized = trained.model_copy(update={"variant": "qat", "quant": quant})
    for ending in ("", "-bn"):
        label = f"ptq-{quant.scheme}{ending}"
        onnx_path = run.onnx_dir / f"{Path(trained.model).stem}-{quant.scheme}-qcdq-ptq{ending}.onnx"
        if not force and is_done(onnx_path, wanted):
            log.info("ptq %s: done already (%s)", label, onnx_path)
            continue
        if ending:
            machine = trained.train.model_copy(update={"device": config.train.device, "workers": config.train.workers})
            reestimate(model, trained.model_copy(update={"train": machine}), run, checkpoint["epoch"])
        path = run.variant_dir(label) / "weights" / "best.pt"
        write_json(run.variant_dir(label) / "quant_config.json", quant_config)
        save_checkpoint(path, quantized, {"scored": scored_state(model), "epoch": checkpoint["epoch"], **wanted})
        write_onnx(config.export, run, load_quantized(run, label), (onnx_path, wanted))
    write_overview(run)


def reestimate(model: DetectionModel, config: Config, run: RunRoot, epoch: int) -> None:
    """Replaces BatchNorm's statistics by those over train.bn_batches train batches, the same and augmented the same as
    those that the baseline's own were re-estimated on after `epoch` (from 0)."""
    device = check_device(config)
    place = torch.device("cpu" if device == "cpu" else f"cuda:{device}")
    with torch.no_grad():
        reestimate_batchnorm(model.to(place), (images.to(place) / 255 for images in train_batches(config, run, epoch)))
    model.to("cpu")


def train_batches(config: Config, run: RunRoot, epoch: int) -> Iterator[torch.Tensor]:
    """uint8 [N,3,imgsz,imgsz]."""
    t, data = config.train, check_det_dataset(str(run.dataset_yaml))
    hyp = cast(Any, get_cfg(overrides=config.hyp.model_dump()))
    dataset = CocoDataset(
        img_path=data["train"], imgsz=t.imgsz, batch_size=t.batch, augment=True, hyp=hyp, rect=False, cache=None,
        stride=32, pad=0.0, task="detect", data=data, seed=t.seed, split="train",
        provenance=read_json(run.provenance, "data"),
    )  # fmt: skip
    if epoch >= t.epochs - config.hyp.close_mosaic:
        dataset.close_mosaic(hyp)
    loader = train_loader(dataset, t.workers, pin_memory=False, epoch=BN_EPOCH)
    n_batches = min(t.bn_batches, len(loader))
    for batch in track(islice(loader, n_batches), "ptq BatchNorm", n_batches, "batches"):
        yield batch["img"]
    loader.close()


def load_quantized(run: RunRoot, label: str) -> Trained:
    """Reads the checkpoint back and computes with torch what its ONNX file must give."""
    path = run.variant_dir(label) / "weights" / "best.pt"
    model, config, checkpoint = load_scored(path)
    bits = Counter(int(layer.weight_quant.bit_width()) for layer in quantized_layers(one_head(model, "raw")))
    truth = torch_truth(model, parity_images(run, config.train.imgsz), dict(bits))
    return Trained(label, model, config, checkpoint["epoch"] + 1, sha256(path), truth)


def write_onnx(settings: Export, run: RunRoot, of: Trained, target: tuple[Path, dict[str, Any]]) -> None:
    """One QCDQ file and its .json through the export's own steps and gates; `target` is its path and what is_done asks.

    Raises:
        RuntimeError: a gate failed; the file was not written.
    """
    path, wanted = target
    record: dict[str, Any] = describe(of, KIND) | wanted | {"variant": "ptq", "checkpoint_sha256": of.checkpoint_sha256}

    def write(part: Path) -> None:
        graph = make_graph(settings, run, of, KIND)
        set_facts(graph, {key: record[key] for key in METADATA} | {"names": NAMES})
        onnx.save(graph, part)
        record["gates"] = check(part, run, of, KIND)
        record["nodes"] = dict(Counter(node.op_type for node in graph.graph.node).most_common())
        record["opset"] = graph.opset_import[0].version

    for old_path in (path.with_suffix(".json"), path):
        old_path.unlink(missing_ok=True)
    write_atomic(path, write)
    file = {"file": path.name, "sha256": sha256(path)}
    write_json(path.with_suffix(".json"), record | file | {"size_bytes": path.stat().st_size})
    record_stage(run, f"ptq {of.label}", file)
    log.info("ptq %s: %s, %.2f MB", of.label, path, path.stat().st_size / 1e6)
