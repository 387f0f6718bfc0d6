"""A parser whose errors are one line with the remedy, as all errors of the user are; arguments that stages share."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NoReturn

MISSING = "the following arguments are required"  # argparse's words; what follows them the user has not typed
HELP = "--help lists the arguments"


class Parser(argparse.ArgumentParser):
    """ArgumentParser without its page of usage above an error; it knows how a setting is written.

    An option is taken in full alone: scripts/checks and scripts/job, and the start of ranks, know it by its name.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        from app.core.files import printable  # imports pydantic: --help answers without it
        from app.core.mounts import as_known

        remedy = HELP if message.startswith(MISSING) else advice(message.split())
        self.exit(2, f"error: {printable(as_known(message))}: {remedy}\n")


def advice(words: list[str]) -> str:
    """How the first word that names a setting is written: train.epochs=3, epochs=3, --epochs 3, --epochs=3."""
    from app.core.config import known_keys

    for word, following in zip(words, [*words[1:], "VALUE"], strict=True):
        name, separator, value = word.strip("'").partition("=")
        if not separator and not name.startswith("--"):
            continue
        option = name.removeprefix("--")
        last_part = option.replace("-", "_")
        dotted = sorted(key for key in known_keys() if "." in key)
        if keys := [key for key in dotted if key == option or key.rpartition(".")[2] == last_part]:
            return f"a setting is written {' or '.join(f'--set {key}={value or following}' for key in keys)}"
        if separator and "." in name:
            return "a setting is written --set key=value; conf/base.yaml lists the keys"
    return HELP


def not_empty(text: str) -> str:
    """A path of the command line; a variable that docker-compose.yml found empty is none."""
    if not text:
        raise argparse.ArgumentTypeError("name two runs or scored folders, A=runs/a B=runs/b")
    return text


def count(text: str) -> int:
    """How often or how many; argparse says what is wrong with a text that is no whole number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is too few: give 1 or more")
    return number


def seconds(text: str) -> float:
    """A time that work may take; argparse says what is wrong with a text that is no number."""
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is no time: give a number of seconds above 0")
    return number


def seconds_or_0(text: str) -> float:
    """The same, or 0 for no work at all."""
    return 0.0 if text == "0" else seconds(text)


def run_arguments(stage: argparse.ArgumentParser, default: str | None = "full") -> None:
    stage.add_argument("--run", default=default, help=f"a folder under --runs-dir (default: {default or 'full'})")
    stage.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: %(default)s")


def job_arguments(stage: argparse.ArgumentParser, default_run: str | None = "full") -> None:
    """Of every stage that reads the configuration."""
    run_arguments(stage, default_run)
    settings_arguments(stage)
    stage.add_argument("--force", action="store_true", help="do it again, overwriting the finished result")


def settings_arguments(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--conf", action="append", type=Path, default=[], help="YAML laid over conf/base.yaml")
    stage.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. train.epochs=3")
