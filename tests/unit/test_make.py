"""Makefile, scripts/job and the compose files, without an engine: what each target is, and what each mistake says."""

from __future__ import annotations

import os
import re
import shlex
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
CHECKS = REPO_DIR / "scripts" / "checks"
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
        ({"RUNNER": "podman"}, "RUNNER=podman: choose docker or local; podman answers as docker through its socket"),
        ({"RUNNER": "local", "ACCEL": "tpu"}, "ACCEL=tpu: choose gpu or cpu"),
        ({"RUNNER": "local", "ACCEL": "cpu", "GPUS": "4"}, "GPUS=4: there is no GPU with ACCEL=cpu"),
        ({"RUNNER": "local", "ACCEL": "cpu", "GPUS": "0,1"}, "GPUS=0,1: write a number from 1 on, or all"),
        (
            {"RUNNER": "local", "ACCEL": "cpu", "COCO_DIR": "/no/such"},
            "COCO_DIR=/no/such does not exist: name the folder",
        ),
        (
            {"RUNNER": "local", "ACCEL": "cpu", "COCO_DIR": "Makefile"},
            "COCO_DIR=Makefile is no folder: name the folder",
        ),
        ({"RUNNER": "local", "ACCEL": "cpu", "CONF": "no.yaml"}, "CONF=no.yaml does not exist: name a YAML file"),
        ({"RUNNER": "local", "ACCEL": "cpu", "CONF": "conf"}, "CONF=conf is a folder: name a YAML file"),
        ({"RUNNER": "local", "ACCEL": "cpu", "ARGS": "--aim don't"}, "ARGS=--aim don't: a quote is not closed"),
        ({"RUNNER": "local", "ACCEL": "cpu", "RUN": "a b"}, "RUN=a b: use letters, digits"),
        ({"RUNNER": "local", "ACCEL": "cpu", "RUN": "../x"}, "RUN=../x: use letters, digits"),
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
        "dataset that is a file",
        "no configuration",
        "configuration that is a folder",
        "open quote",
        "RUN of two words",
        "RUN above runs",
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


def test_what_make_is_given_is_text() -> None:
    result = make("data", "RUN=$(shell echo x)", "ACCEL=cpu", "RUNNER=local")
    assert "RUN=$(shell echo x): use letters, digits" in result.stderr


def test_the_container_gets_the_words_of_args_and_conf(tmp_path: Path) -> None:
    conf = tmp_path / "it's a.yaml"
    conf.touch()
    args = """--set 'a b' *.md $(id) ${HOME} ; x | y "it's" '' """
    result = make(
        "data", f"CONF={conf}", f"ARGS={args}", RUNNER="docker", ACCEL="cpu", ENGINE=PLAIN_ENGINE, COMPOSE="2"
    )
    assert result.returncode == 0, result.stderr
    said, mounts = result.stdout.partition(", ARGS: ")[2].split("\n", 1)
    words = ["--set", "a b", "*.md", "$(id)", "${HOME}", ";", "x", "|", "y", "it's", ""]
    assert shlex.split(said) == ["--conf", "/conf/0/it's a.yaml", *words]
    assert f"<{conf}:/conf/0/it's a.yaml:ro>" in mounts


def test_stop_finds_a_folder_with_a_blank() -> None:
    assert '"label=com.docker.compose.project.working_dir=$(pwd -P)"' in make("-n", "stop").stdout


def check(snippet: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs functions of scripts/checks in a folder: what scripts/job says before anything starts."""
    defined = {"RUNNER": "docker", "target": "data", "RUN": "r", "engine": PLAIN_ENGINE, **variables}
    lines = [f"{name}={shlex.quote(value)}" for name, value in defined.items()]
    script = "\n".join(["set -euo pipefail", 'fail() { echo "$*" >&2; exit 2; }', *lines, f". {CHECKS}", snippet])
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)


def test_a_link_that_leads_out_of_the_dataset_is_named_for_the_container_alone(tmp_path: Path) -> None:
    coco_dir, disk_dir = tmp_path / "coco", tmp_path / "disk"
    (coco_dir / "images").mkdir(parents=True)
    disk_dir.mkdir()
    (coco_dir / "val2017").symlink_to("images")
    assert check("check_dataset", tmp_path, COCO_DIR="coco").returncode == 0, "a link within the folder"
    (coco_dir / "train2017").symlink_to(disk_dir)
    result = check("check_dataset", tmp_path, COCO_DIR="coco")
    assert result.returncode == 2
    assert (
        f"leads out of what the container sees, {coco_dir}/train2017 -> {disk_dir}: use RUNNER=local" in result.stderr
    )
    assert check("check_dataset", tmp_path, COCO_DIR="coco", RUNNER="local").returncode == 0


def test_a_run_that_is_a_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "r").symlink_to(tmp_path)
    result = check("check_places", tmp_path)
    assert result.returncode == 2
    assert f"runs/r is a link that leads out of what the container sees, to {tmp_path}" in result.stderr
    assert check("check_places", tmp_path, RUNNER="local").returncode == 0


def test_runs_that_cannot_be_written_to_are_named_with_their_owner(tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir(mode=0o555)
    result = check("check_place runs runs", tmp_path, owner="65534:65534")
    assert result.returncode == 2
    assert f"runs is not writable for uid 65534, it belongs to uid {os.getuid()} (mode 555)" in result.stderr
    assert f"sudo chown -R 65534:65534 '{runs_dir}'" in result.stderr


@pytest.mark.parametrize(
    "engine",
    ['28.0 {"runc":{}} ["name=seccomp","name=rootless"] /data', "4.3 {} null /home/u/.local/share/containers/storage"],
    ids=["docker", "podman"],
)
def test_under_a_rootless_engine_the_caller_is_the_root_of_the_container(tmp_path: Path, engine: str) -> None:
    assert check('check_places; echo "$owner"', tmp_path, engine=engine).stdout == "0:0\n"
    assert check('check_places; echo "$owner"', tmp_path).stdout == f"{os.getuid()}:{os.getgid()}\n"


def test_selinux_is_named_where_it_keeps_containers_out(tmp_path: Path) -> None:
    engine = '28.0 {"runc":{}} ["name=seccomp","name=selinux"] /var/lib/docker'
    label = 'stat() {{ echo "system_u:object_r:{}:s0"; }}; check_dataset'
    refused = check(label.format("default_t"), tmp_path, engine=engine, COCO_DIR=".")
    assert refused.returncode == 2
    assert f"SELinux keeps containers out: sudo chcon -R -t container_file_t '{tmp_path}'" in refused.stderr
    assert check(label.format("container_file_t"), tmp_path, engine=engine, COCO_DIR=".").returncode == 0


def test_the_download_sees_the_dataset_folder_alone() -> None:
    volumes = services("docker-compose.yml")["download-coco"]["volumes"]
    targets = [volume["target"] if isinstance(volume, dict) else volume.rsplit(":", 2)[1] for volume in volumes]
    assert targets == ["/data/coco", "/mnt/ca_bundle"]
