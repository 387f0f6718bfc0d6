"""Command lines of the stages that make a dataset: draw and download-coco. Imports a stage when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def draw_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--to", type=Path, default=Path("data/drawn"), help="target folder (default: %(default)s)")
    stage.add_argument("--n-train", type=int, default=118_287, help="train images (default: COCO's %(default)s)")
    stage.add_argument("--n-val", type=int, default=5_000, help="val images (default: COCO's %(default)s)")
    stage.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    stage.add_argument(
        "--scene", choices=("coco", "coco-subset"), default="coco",
        help="COCO's sizes of images and boxes, or the large shapes of the smoke (default: %(default)s)",
    )  # fmt: skip
    stage.add_argument("--size", type=int, metavar="PX", help="scene coco: long side of most images (default: 640)")
    stage.add_argument("--classes", type=int, metavar="N", help="scene coco: the first N of COCO's 80 (default: 80)")


def draw(args: argparse.Namespace) -> None:
    from app.data.draw import Wanted, draw

    draw(args.to, Wanted(args.scene, args.n_train, args.n_val, args.seed, args.size, args.classes))


def download_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--to", type=Path, default=Path("data/coco"), help="target folder (default: %(default)s)")
    stage.add_argument("--keep-archives", action="store_true", help="leave the ZIP files there")


def download(args: argparse.Namespace) -> None:
    from app.data.download import download_coco

    download_coco(args.to, args.keep_archives)
