"""`python -m tests.support.tiny_stages STAGE ...` leaves behind what a stage of app does; it imports nothing of app.

A training has epochs of EPOCH_S seconds, writes results.csv after each, and goes on where it stopped, with --force from
the beginning. What begins and how it ends is in calls.txt of the runs' folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

EPOCH_S = 0.1
FAILS = "FAILS"  # variable: the labels whose trainings end with exit code 1


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    for name in ("--run", "--runs-dir", "--variant"):
        parser.add_argument(name)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    settings = dict(item.split("=") for item in args.set)
    label = "fp16" if args.variant == "fp16" else f"qat-{Path(settings.get('quant.scheme', '')).stem}"
    name = f"{args.run} {label} {args.stage}" if args.stage in ("train", "ptq") else f"{args.run} {args.stage}"
    name += " forced" if args.force else ""
    runs_dir = Path(args.runs_dir)
    if args.force and args.stage == "train":
        shutil.rmtree(runs_dir / args.run / label)
    note(runs_dir, f"{name} begins {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}")
    code = train(runs_dir / args.run / label, int(settings["train.epochs"])) if args.stage == "train" else 0
    if args.stage == "ptq" and not (runs_dir / args.run / "fp16" / "done.json").exists():
        sys.stderr.write("error: no finished training of fp16\n")
        code = 2
    if args.stage == "export" and not list((runs_dir / args.run).glob("*/done.json")):
        sys.stderr.write("error: no finished training\n")
        code = 2
    note(runs_dir, f"{name} ends {code}")
    return code


def note(runs_dir: Path, line: str) -> None:
    with open(runs_dir / "calls.txt", "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def train(folder: Path, n_epochs: int) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    if folder.name in os.environ.get(FAILS, "").split():
        sys.stderr.write("the guard ended it\n")
        return 1
    path = folder / "results.csv"
    folder.mkdir(parents=True, exist_ok=True)
    n_done = len(path.read_text().splitlines()) - 1 if path.exists() else 0
    for epoch in range(n_done + 1, n_epochs + 1):
        time.sleep(EPOCH_S)
        part = path.with_suffix(".part")
        part.write_text("\n".join(["epoch", *map(str, range(1, epoch + 1))]) + "\n")
        part.replace(path)
        if stopped:
            return 128 + stopped[0]
    (folder / "done.json").write_text(json.dumps({"epochs": n_epochs, "best_ap": 0.25}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
