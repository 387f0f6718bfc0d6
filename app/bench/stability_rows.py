"""What the trainings of the stability bench gave, a row each: from their folders, or from what earlier calls wrote."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from app.config import LATER_STAGES, MACHINE_KEYS, Config, UserError, difference, flatten, shown
from app.curves import STATES, candidates, read_rows, train_loss
from app.run import read_json

Row = dict[str, Any]
OWN_KEYS = (*MACHINE_KEYS, *LATER_STAGES, "data.coco_dir", "train.seed")  # may differ between rows of one table


def read_arm(job: tuple[str, int], out_dir: Path) -> Row | None:
    """The curves of one training so far, [validations] each, and where it ran; None before a validation that counts."""
    rows = candidates(read_rows(out_dir / "results.csv")) if (out_dir / "results.csv").exists() else []
    if not rows:
        return None
    env = read_json(out_dir / "env.json", "bench")
    gpu = (env["gpus"] or ["none"])[0].split(",")[0]
    return {
        "arm": job[0], "seed": job[1], "epoch": [int(row["epoch"]) for row in rows],
        "AP": {state: [row[f"AP/{state}"] for row in rows] for state in STATES},
        "train_loss": [round(train_loss(row), 5) for row in rows],
        "val_loss": [round(row["val_loss/ema_bn"], 5) for row in rows], "corrected": rows[-1].get("AP/corrected"),
        "gpu": gpu, "torch": env["packages"]["torch"], "code_version": env["code_version"],
    }  # fmt: skip


def recipe(base: Config, arms: dict[str, list[str]]) -> dict[str, Any]:
    """What rows of one table have in common: the configuration that the arms start from, a qat variant's, and what each
    sets beside it."""
    return {"config": {key: value for key, value in flatten(base).items() if not is_own(key)}, "arms": arms}


def is_own(key: str) -> bool:
    return key in OWN_KEYS or key.split(".")[0] in OWN_KEYS


def with_others(own: Iterable[Row], files: list[Path], expected: dict[str, Any], seeds: list[int] | None) -> list[Row]:
    """Own rows, and those of the files' arms and seeds asked for that are not among them, in the arms' order.

    Raises:
        UserError: a file is missing or of something else, or it holds trainings of another recipe.
    """
    rows = {(row["arm"], row["seed"]): row for row in own}
    for path in files:
        other = read_json(path, "bench ARGS=stability")
        if not {"config", "arms", "rows"} <= set(other):
            raise UserError(f"--with {path}: not a bench-stability.json")
        # A key that is new since then has the value that it had without it.
        known = {key: value for key, value in expected["config"].items() if key in other["config"]}
        if differences := difference(other["config"], known):
            raise UserError(f"--with {path}: other settings ({shown(differences)})")
        for row in other["rows"]:
            arm = row["arm"]
            if arm not in expected["arms"] or (seeds is not None and row["seed"] not in seeds):
                continue
            if other["arms"][arm] != expected["arms"][arm]:
                raise UserError(f"--with {path}: {arm} was {other['arms'][arm]}, now it is {expected['arms'][arm]}")
            rows.setdefault((arm, row["seed"]), row)
    order = list(expected["arms"])
    return sorted(rows.values(), key=lambda row: (order.index(row["arm"]), row["seed"]))


def up_to(row: Row, epoch: int | None) -> Row | None:
    """A row as it was at an epoch; None before a validation that counts."""
    n = sum(epoch is None or of <= epoch for of in row["epoch"])
    if n == len(row["epoch"]):
        return row
    curves = {key: row[key][:n] for key in ("epoch", "train_loss", "val_loss")}
    aps = {state: curve[:n] for state, curve in row["AP"].items()}
    return {**row, **curves, "AP": aps, "corrected": None} if n else None
