"""Makefile, scripts/job and the compose files, without an engine: what each target is, and what each mistake says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO_DIR = Path(__file__).resolve().parents[2]
STAND_INS_DIR = Path(__file__).resolve().parent / "stand_ins"
TARGETS = re.findall(r"^([a-z0-9-]+):.*## ", (REPO_DIR / "Makefile").read_text(), re.MULTILINE)
PROMISED = (
    "smoke test train-fp16 train-qat export ptq eval report all data download-coco tensorboard bench build lint stop"
)
GPU_JOBS = {"train-fp16", "train-qat", "export", "ptq", "eval", "all", "bench", "smoke"}
# What `make test` without a container hands down to the tests.
OF_A_MAKE_AROUND = "RUNNER ACCEL RUN GPUS CONF COCO_DIR ARGS MAKEFLAGS MAKEOVERRIDES MAKELEVEL".split()
PLAIN_ENGINE = '20.10 {"runc":{"path":"runc"}}'  # what `docker info` says without NVIDIA's toolkit


class ComposeLoader(yaml.SafeLoader):
    """SafeLoader that also knows compose's `!reset`."""


ComposeLoader.add_constructor("!reset", lambda loader, node: None)


def services(file: str) -> dict[str, Any]:
    return yaml.load((REPO_DIR / file).read_text(), ComposeLoader)["services"]  # noqa: S506 - a SafeLoader


def make(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_MAKE_AROUND}
    settings = {**kept, "PATH": f"{STAND_INS_DIR}:{os.environ['PATH']}", "ENGINE": "", **env}
    return subprocess.run(
        ["make", "--no-print-directory", *args], cwd=REPO_DIR, env=settings, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("target", sorted({*PROMISED.split(), *TARGETS}))
def test_every_target_resolves_and_is_listed(target: str) -> None:
    result = make("-n", target)
    assert result.returncode == 0, result.stderr
    assert target in TARGETS, "make help does not show it"


def test_help_is_the_default_and_lists_every_target() -> None:
    listed = re.findall(r"^  make (\S+)", make().stdout, re.MULTILINE)
    assert listed == TARGETS


def test_every_job_has_a_service_of_its_name() -> None:
    jobs = {target for target in TARGETS if f"scripts/job {target}" in make("-n", target).stdout}
    assert jobs - {"build"} == set(services("docker-compose.yml"))


def test_the_cpu_file_takes_away_each_gpu_and_nothing_else() -> None:
    reserving = {name for name, service in services("docker-compose.yml").items() if "deploy" in service}
    assert reserving == GPU_JOBS
    taken = services("docker-compose.cpu.yml")
    assert set(taken) == GPU_JOBS
    assert all(service["deploy"] is None for service in taken.values())


def test_only_the_download_has_a_network_and_only_tensorboard_a_port() -> None:
    found = services("docker-compose.yml")
    assert {name for name, service in found.items() if service.get("network_mode") != "none"} == {
        "download-coco", "tensorboard"
    }  # fmt: skip
    assert {name for name, service in found.items() if "ports" in service} == {"tensorboard"}
    assert all(port.startswith("127.0.0.1:") for port in found["tensorboard"]["ports"])


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RUNNER": "docker"}, "RUNNER=docker: no engine answers: start Docker, or use RUNNER=local"),
        ({"RUNNER": "docker", "ENGINE": PLAIN_ENGINE}, "'docker compose' is missing: install the compose plugin"),
        (
            {"ACCEL": "gpu", "ENGINE": PLAIN_ENGINE},
            "install the NVIDIA Container Toolkit (docs/container.md), or use ACCEL=cpu",
        ),
        ({"RUNNER": "podman"}, "RUNNER=podman: choose docker or local"),
        ({"RUNNER": "local", "ACCEL": "tpu"}, "ACCEL=tpu: choose gpu or cpu"),
        ({"RUNNER": "local", "ACCEL": "cpu", "GPUS": "4"}, "GPUS=4: there is no GPU with ACCEL=cpu"),
        ({"RUNNER": "local", "ACCEL": "cpu", "GPUS": "0,1"}, "GPUS=0,1: write a number from 1 on, or all"),
        (
            {"RUNNER": "local", "ACCEL": "cpu", "COCO_DIR": "/no/such"},
            "COCO_DIR=/no/such does not exist: name the folder",
        ),
        ({"RUNNER": "local", "ACCEL": "cpu", "CONF": "no.yaml"}, "CONF=no.yaml does not exist: name a YAML file"),
    ],
    ids=[
        "no engine",
        "no compose",
        "no toolkit",
        "runner",
        "accel",
        "GPUs without one",
        "list of GPUs",
        "no dataset",
        "no configuration",
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(env: dict[str, str], said: str) -> None:
    result = make("data", **env)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(lines) == 1, result.stderr
    assert said in lines[0]


def test_an_engine_with_the_nvidia_runtime_is_preferred() -> None:
    result = make("data", ENGINE='28.0 {"nvidia":{},"runc":{}}')
    assert result.stdout.startswith("runner: docker, accel: gpu, run: full")
