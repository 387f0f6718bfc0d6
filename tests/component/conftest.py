"""Runs that several test modules look at; a test that changes one works on a copy (`copy_of`)."""

from __future__ import annotations

import pytest

from app.core.run import RunRoot


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> RunRoot:
    """Both variants of a small network, exported in both contracts."""
    from app.export.export import export  # here, as modules without torch need not wait for it
    from tests.support.export_run import TINY, TINY_SETS, config_of, make_run, network

    with network(TINY):
        run = make_run(tmp_path_factory.mktemp("tiny"), *TINY_SETS)
        export(config_of(run, "qat", *TINY_SETS, "export.contracts=[raw,end2end]"), run, force=False)
    return run
