"""Command line of eval: what only this stage takes."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--onnx", type=Path, help="score this file instead of those of the run")
    stage.add_argument("--coco-dir", type=Path, help="with --onnx: COCO folder (default: data.coco_dir)")
    stage.add_argument("--split", help="with --onnx: a folder of images (default: val2017, or what the layout has)")
    stage.add_argument("--out", type=Path, help="with --onnx: folder of the scores (default: RUNS_DIR/eval/NAME)")
    stage.add_argument("--max-images", type=int, help="first N of a seeded order; labelled as a subset")
    stage.add_argument(
        "--contract", choices=("raw", "end2end", "nms"),
        help="with --onnx: what the output is, where the file does not say it; raw needs no suppression, nms does",
    )  # fmt: skip
    stage.add_argument("--names", type=Path, metavar="FILE", help="with --onnx: its class names, as conf/coco.names")
    stage.add_argument("--imgsz", type=int, metavar="PX", help="with --onnx: side of its input, where that is free")
