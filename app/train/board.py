"""python -m app.train.board: TensorBoard over all runs, each under its own name, smoke/fp16, without /tensorboard.

TensorBoard names a run after the folder of its events. So it is started on a folder of links, which a thread keeps
current: <link folder>/smoke/fp16 -> runs/smoke/fp16/tensorboard.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboard import program

from app.core.command_line import Parser
from app.core.config import UserError
from app.core.progress import set_up_terminal

EVENTS_DIR = "tensorboard"  # in the folder of every variant
REFRESH_S = 5.0  # seconds until a new training is seen, and until TensorBoard reads new events
PAUSE_S = 0.5  # a signal that comes just before a pause is answered after it
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
log = logging.getLogger("app.board")


def main() -> int:
    parser = Parser(prog="python -m app.train.board", description=__doc__)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=6006, help="default: %(default)s")
    parser.add_argument("--told-port", type=int, help="the port as it is seen outside of a container")
    args = parser.parse_args()
    set_up_terminal()
    for number in STOPPING:
        signal.signal(number, stop)
    atexit.register(ignore_signals)
    try:
        with served(args.runs_dir, args.host, args.port):
            log.info("http://localhost:%d", args.told_port or args.port)
            while True:
                time.sleep(PAUSE_S)
    except UserError as error:
        log.error("error: %s", error)
        return 2


def stop(number: int, _frame: object) -> None:
    """Ends the process once: a second signal must not interrupt the removal of the links."""
    for other in STOPPING:
        signal.signal(other, lambda *_: None)
    sys.exit(128 + number)


def ignore_signals() -> None:
    """For the end of the process: Python takes handlers away before that, and then a signal would kill it."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def served(runs_dir: Path, host: str, port: int) -> Iterator[None]:
    """TensorBoard over every training under `runs_dir`, new ones too, while the context lasts. It prints nothing.

    Raises:
        UserError: the port is taken or may not be opened.
    """
    with tempfile.TemporaryDirectory(prefix="tensorboard-") as folder:
        names = Path(folder)
        link_events(runs_dir, names)
        threading.Thread(target=keep_current, args=(runs_dir, names, threading.Event()), daemon=True).start()
        board = program.TensorBoard()
        board.configure(logdir=folder, host=host, port=port, reload_interval=REFRESH_S)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # it praises its fast loading of data
                board.launch()
        except program.TensorBoardServerException as error:
            raise UserError(f"{error.msg}: make tensorboard TENSORBOARD_PORT={port + 1} takes another") from error
        yield


def keep_current(runs_dir: Path, names: Path, stop: threading.Event) -> None:
    """Links again every REFRESH_S seconds, until `stop` is set or the folder of links has gone."""
    while not stop.wait(REFRESH_S) and names.is_dir():
        link_events(runs_dir, names)


def link_events(runs_dir: Path, names: Path) -> None:
    """Makes names/<run>/<variant> a link to the events of every training, and removes links to what has gone."""
    for link in names.glob("*/*"):
        if not link.is_dir():
            link.unlink()
    for events in runs_dir.glob(f"[!.]*/*/{EVENTS_DIR}"):  # none of hidden folders, as .cache
        link = names / events.parent.relative_to(runs_dir)
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(events.resolve())


if __name__ == "__main__":
    sys.exit(main())
