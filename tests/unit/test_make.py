"""Makefile, scripts/job and the compose files, without an engine: what each target is, and what each mistake says."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO_DIR = Path(__file__).resolve().parents[2]
STAND_INS_DIR = Path(__file__).resolve().parent / "stand_ins"
TARGETS = re.findall(r"^([a-z0-9-]+):.*## ", (REPO_DIR / "Makefile").read_text(), re.MULTILINE)
PROMISED = (
    "smoke test train-fp16 train-qat export ptq eval report all data draw download-coco "
    "tensorboard bench build lint stop"
)
GPU_JOBS = {
    "train-fp16",
    "train-qat",
    "export",
    "ptq",
    "eval",
    "all",
    "bench",
    "estimate",
    "smoke",
    "sweep",
    "sensitivity",
}
# What `make test` without a container hands down to the tests.
OF_A_MAKE_AROUND = (
    "RUNNER ACCEL RUN GPUS CUDA_VISIBLE_DEVICES CONF COCO_DIR ARGS MAKEFLAGS MAKEOVERRIDES MAKELEVEL".split()
)
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
        ({"RUNNER": "local", "ACCEL": "cpu", "RUN": "-x"}, "RUN=-x: use letters, digits"),
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
        "RUN that looks like an option",
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


@pytest.mark.parametrize(
    "args",
    ["--set 'quant.scheme={}'", "'--set=quant.scheme={}'", "--scheme '{}'", "'--scheme={}'",
     "--set 'train.weights={}'", "'--set=train.weights={}'"],
)  # fmt: skip
def test_the_container_sees_a_file_of_a_setting_under_its_own_name(tmp_path: Path, args: str) -> None:
    file = tmp_path / "its own.yaml"
    file.touch()
    given = f"--set train.epochs=1 {args.format(file)} --set quant.scheme=w4a16"
    result = make("ptq", f"ARGS={given}", **IN_DOCKER)
    assert result.returncode == 0, result.stderr
    said, mounts = result.stdout.partition(", ARGS: ")[2].split("\n", 1)
    assert shlex.split(said) == shlex.split(given.replace(str(file), f"/host{file}"))
    assert f"<{file}:/host{file}:ro>" in mounts


def test_the_container_sees_the_files_of_a_list(tmp_path: Path) -> None:
    """Names of schemes stay as they are."""
    file = tmp_path / "its own.yaml"
    file.touch()
    given = f"--set 'sensitivity.against=[w4a16, {file}]' --images 3"
    result = make("sensitivity", f"ARGS={given}", **IN_DOCKER)
    assert result.returncode == 0, result.stderr
    said, mounts = result.stdout.partition(", ARGS: ")[2].split("\n", 1)
    assert shlex.split(said) == ["--set", f"sensitivity.against=[w4a16,/host{file}]", "--images", "3"]
    assert f"<{file}:/host{file}:ro>" in mounts


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


# --- what make does not know ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smok"], "smok: no such target, did you mean smoke? (make lists all)"),
        (["tets"], "tets: no such target, did you mean test? (make lists all)"),
        (["train"], "train: no such target, did you mean train-fp16 or train-qat? (make lists all)"),
        (["deploy"], "deploy: no such target (make lists all)"),
        (["all", "COCO_DIR"], "COCO_DIR: no target but a variable, write COCO_DIR=value"),
        (["train-qat", "epochs=3"], 'epochs=3: no variable of make, write ARGS="--set train.epochs=3"'),
        (["train-qat", "train.epochs=3"], 'train.epochs=3: no variable of make, write ARGS="--set train.epochs=3"'),
        (["all", "LR0=$(shell echo 1)@"], 'no variable of make, write ARGS="--set hyp.lr0=$(shell echo 1)@"'),
        (["all", "seed=1"], 'seed=1: no variable of make, write ARGS="--set data.seed=1" or ARGS="--set train.seed=1"'),
        (["all", "run=x"], "run=x: no variable of make, did you mean RUN=x?"),
        (["all", "GPU=2"], "GPU=2: no variable of make, did you mean GPUS=2?"),
        (["all", "OMP_THREADS=2"], "a variable of the environment before make"),
        (["report", "A=runs/a"], "A=... and B=... are for make compare"),
        (["all", "ONNX=x.onnx"], "ONNX=... is for make eval"),
        (["all", "WEIGHTS=x.pt"], 'import-weights; a training takes ARGS="--set train.weights=FILE"'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_word_that_make_does_not_know_is_one_line(words: list[str], said: str) -> None:
    result = make(*words)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(rf"Makefile:\d+: \*\*\* .*{re.escape(said)}.*\.  Stop\.\n", result.stderr), result.stderr


def test_variables_of_the_environment_are_nobodys_mistake() -> None:
    assert make("-n", "data", EPOCHS="3", A="x", ONNX="y").returncode == 0


def test_every_variable_that_the_documents_name_is_known() -> None:
    known = set(make("-pn", "help").stdout.partition("\nVARIABLES := ")[2].partition("\n")[0].split())
    shown = set()
    for page in (REPO_DIR / "README.md", *(REPO_DIR / "docs").glob("*.md")):
        for command in re.findall(r"\bmake [^`\n]*", page.read_text()):
            shown |= set(re.findall(r"(?:^| )([A-Za-z_]+)=", re.sub(r"ARGS=(\"[^\"]*|'[^']*)", "ARGS=", command)))
    assert {"RUN", "COCO_DIR", "A", "B", "ONNX", "TENSORBOARD_PORT"} <= shown <= known


def test_documents_show_commands_of_make_or_compose() -> None:
    """A reader has no Python on the host: `python -m app` stands only in the section on doing without make."""
    shown = []
    for page in (REPO_DIR / "README.md", *(REPO_DIR / "docs").glob("*.md")):
        for line in page.read_text().splitlines():
            if "python -m app" in line and "STAGE" not in line and "--help" not in line:
                shown.append((page.name, line))
    assert shown == []


# --- what a job is given ----------------------------------------------------------------------------------------------

IN_DOCKER = {"RUNNER": "docker", "ACCEL": "cpu", "ENGINE": PLAIN_ENGINE, "COMPOSE": "2"}
HERE = {"RUNNER": "local", "ACCEL": "cpu"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "ARGS=train.epochs=3"], 'ARGS=train.epochs=3: a setting is written ARGS="--set train.epochs=3"'),
        (["compare", "A=docs"], "B is not given: make compare A=runs/a B=runs/b"),
        (["compare", "A=docs", "B=none"], "B=none is no folder: name a run, runs/NAME"),
        (["eval", "ONNX=none.onnx"], "ONNX=none.onnx is no file: name an ONNX file"),
        (["import-weights"], "WEIGHTS is not given: make import-weights WEIGHTS=best.pt RUN=name"),
        (["import-weights", "WEIGHTS=none.pt"], "WEIGHTS=none.pt is no file: name a checkpoint such as best.pt"),
        (["tensorboard", "TENSORBOARD_PORT=x"], "TENSORBOARD_PORT=x: write a number up to 65535"),
    ],
    ids=["setting", "one run", "no run", "no file", "no weights", "no checkpoint", "port"],
)
def test_a_mistake_in_what_is_given_is_one_line(words: list[str], said: str) -> None:
    result = make(*words, **HERE)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make: ***")]
    assert said in line


@pytest.mark.parametrize("args", ["--set train.epochs=3", "--force --set a.b=1 --set c.d=2", "-k a.b=1"])
def test_settings_that_are_written_well_are_taken(tmp_path: Path, args: str) -> None:
    split = 'split args "$ARGS"; check_args'
    assert check(split, tmp_path, ARGS=args, target="data" if "--" in args else "test").returncode == 0


@pytest.mark.parametrize("args", ["--help", "--version"])
def test_words_of_args_are_no_options_of_what_splits_them(tmp_path: Path, args: str) -> None:
    result = check('split args "$ARGS"; printf "<%s>" "${args[@]}"', tmp_path, ARGS=args)
    assert (result.stdout, result.stderr) == (f"<{args}>", "")


@pytest.mark.parametrize("out", ['--out "$OUT"', '"--out=$OUT"'])
def test_the_container_writes_to_runs_alone(tmp_path: Path, out: str) -> None:
    split = f"args=({out}); check_args"
    refused = check(split, tmp_path, OUT="/elsewhere")
    assert (refused.returncode, "ARGS=--out /elsewhere: the container writes to runs/ alone" in refused.stderr) == (
        2,
        True,
    )
    assert check(split, tmp_path, OUT="runs/x").returncode == 0
    assert check(split, tmp_path, OUT="/elsewhere", RUNNER="local").returncode == 0


def test_a_port_that_is_taken_is_named_with_another(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        taken = check("check_port", tmp_path, TENSORBOARD_PORT=str(port))
    assert taken.returncode == 2
    assert f"port {port} is taken: open http://localhost:{port} if that is TensorBoard" in taken.stderr
    assert f"TENSORBOARD_PORT={port + 1}" in taken.stderr
    assert check("check_port", tmp_path, TENSORBOARD_PORT=str(port)).returncode == 0


def test_a_missing_gpu_is_told_where_the_toolkit_is_there(tmp_path: Path) -> None:
    engine = {"ENGINE": '28.0 {"nvidia":{},"runc":{}}', "COMPOSE": "2"}
    nothing_here = "compgen() { false; }; nvidia-smi() { false; }; docker() { true; }; check_engine"
    told = check(nothing_here, tmp_path, ACCEL="gpu", **engine)
    assert (told.returncode, told.stderr) == (
        0, "no GPU is to be seen on this machine; should the engine refuse: ACCEL=cpu\n"
    )  # fmt: skip
    assert check(nothing_here, tmp_path, ACCEL="gpu", DOCKER_HOST="ssh://there", **engine).stderr == ""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Runs, a file with weights beside it and a file of names, all outside of the checkout."""
    for name in ("runs/a", "runs/b", "models"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("it's a.onnx", "a.data"):
        (tmp_path / "models" / name).touch()
    (tmp_path / "names").touch()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "models" / "it's a.onnx")
    return tmp_path


def test_files_outside_of_the_checkout_are_mounted_read_only(outside: Path) -> None:
    onnx = outside / "models" / "it's a.onnx"
    result = make("eval", f"ONNX={onnx}", f"ARGS=--names {outside}/names --split x", **IN_DOCKER)
    assert result.returncode == 0, result.stderr
    assert f"</host{onnx.parent}" not in result.stdout
    assert f"<{onnx.parent}:/host{onnx.parent}:ro>" in result.stdout, "its weights may stand beside it"
    assert f"<{outside}/names:/host{outside}/names:ro>" in result.stdout
    said = result.stdout.partition(", ARGS: ")[2].split("\n", 1)[0]
    assert shlex.split(said) == ["--names", f"/host{outside}/names", "--split", "x"]
    assert f"ONNX: /host{outside}/models/it'\\''s a.onnx" in result.stdout, "as it stands between single quotes"


def test_a_path_that_no_engine_mounts_is_named(outside: Path) -> None:
    (outside / "names").rename(outside / "na:mes")
    result = make("eval", f"ONNX={outside}/link.onnx", f"ARGS=--names {outside}/na:mes", **IN_DOCKER)
    assert result.returncode == 2
    assert f"{outside}/na:mes: an engine cannot mount a path with a colon: rename it" in result.stderr


@pytest.mark.parametrize(("seen", "gpus", "left"), [("3,1", "1", "3"), ("3,1", "all", "3,1"), ("", "1", None)])
def test_gpus_that_are_hidden_stay_hidden(tmp_path: Path, seen: str, gpus: str, left: str | None) -> None:
    job = str(REPO_DIR / "scripts" / "job")
    script = '. <(sed -n "/^show_gpus/,/^}/p" "$JOB"); show_gpus; echo "$CUDA_VISIBLE_DEVICES"'
    result = check(script, tmp_path, JOB=job, CUDA_VISIBLE_DEVICES=seen, GPUS=gpus)
    if left is None:
        assert (result.returncode, "CUDA_VISIBLE_DEVICES is empty" in result.stderr) == (2, True)
    else:
        assert result.stdout == f"{left}\n"


GPU_IN_DOCKER = {"RUNNER": "docker", "ACCEL": "gpu", "ENGINE": '28.0 {"nvidia":{},"runc":{}}', "COMPOSE": "2"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["CUDA_VISIBLE_DEVICES=3,1"], ["GPUS: all", "<CUDA_VISIBLE_DEVICES=3>"]),
        (["CUDA_VISIBLE_DEVICES=3,1", "GPUS=2"], ["GPUS: all", "<CUDA_VISIBLE_DEVICES=3,1>"]),
        (["GPUS=2"], ["GPUS: 2"]),
    ],
)
def test_the_container_uses_the_gpus_that_are_not_hidden(words: list[str], told: list[str]) -> None:
    result = make("train-qat", *words, **GPU_IN_DOCKER)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith(("GPUS: ", "<CUDA_"))] == told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["CUDA_VISIBLE_DEVICES="], "CUDA_VISIBLE_DEVICES is empty, so no GPU is to be seen"),
        (["CUDA_VISIBLE_DEVICES=3", "GPUS=2"], "GPUS=2: there are only 1 (3)"),
    ],
)
def test_gpus_that_the_container_has_not_are_refused(words: list[str], said: str) -> None:
    result = make("train-qat", *words, **GPU_IN_DOCKER)
    assert (result.returncode, said in result.stderr) == (2, True)


def test_weights_to_import_are_mounted_alone_and_read_only(outside: Path) -> None:
    weights = outside / "names"
    result = make("import-weights", f"WEIGHTS={weights}", **IN_DOCKER)
    assert result.returncode == 0, result.stderr
    assert f"<{weights}:/host{weights}:ro>" in result.stdout
    assert f"WEIGHTS: /host{weights}\n" in result.stdout


def test_a_link_is_mounted_under_its_own_name(outside: Path) -> None:
    result = make("eval", f"ONNX={outside}/link.onnx", **IN_DOCKER)
    assert f"<{outside}/models/it's a.onnx:/host{outside}/link.onnx:ro>" in result.stdout


def test_what_the_container_sees_anyway_is_not_mounted_again(outside: Path) -> None:
    """COCO_DIR, runs/ and data/ have their names in the container."""
    words = [f"COCO_DIR={outside}", f"A={outside}/runs/a", f"B={REPO_DIR}/runs/reports"]
    result = make("compare", *words, **IN_DOCKER)
    assert result.returncode == 0, result.stderr
    assert "A: /data/coco/runs/a, B: runs/reports\n" in result.stdout
    assert "/host" not in result.stdout


def test_a_configuration_is_named_as_it_was_given(tmp_path: Path) -> None:
    given = os.path.relpath(tmp_path / "my.yaml", REPO_DIR)
    (tmp_path / "my.yaml").touch()
    result = make("data", f"CONF={given}", **IN_DOCKER)
    assert f"MOUNTS: \n/conf/0/my.yaml={given}\n" in result.stdout


def test_the_venv_gets_the_same_commands(outside: Path) -> None:
    """`docker compose` reads them from its file; tests/container compares the two."""
    script = 'target=compare A=runs/a B=runs/b COCO_DIR=/c; . <(sed -n "/^local_command/,/^}/p" "$JOB"); local_command'
    job = str(REPO_DIR / "scripts" / "job")
    shown = check(f'{script}; printf "%s\\n" "${{command[@]}}"', outside, JOB=job)
    words = ["python", "-m", "app", "compare", "runs/a", "runs/b", "--set", "data.coco_dir=/c"]
    assert shown.stdout.split() == words, shown.stderr


# --- what is printed --------------------------------------------------------------------------------------------------


def test_tensorboard_says_nothing_of_its_runner() -> None:
    result = make("tensorboard", TENSORBOARD_PORT="0", **IN_DOCKER)
    assert result.returncode == 0, result.stderr
    assert "runner:" not in result.stdout


def test_a_build_shows_steps_and_large_packages_with_their_sizes() -> None:
    lines = [
        "#8 [tensorboard 4/5] RUN --mount=type=secret", "#8 1.2 Downloading torch (858.1MiB)",
        "#8 1.2 Downloading ruff (10.2MiB)", "#8 1.3 Downloading big (1.5GiB)", "#8 30.0  Downloaded ruff",
        "#8 31.0  Downloaded torch", "#8 40.0 Prepared 101 packages in 1m 53s", "#8 41.0  + torch==2.10.0",
    ]  # fmt: skip
    shown = subprocess.run(
        [REPO_DIR / "scripts" / "progress"], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines() == [
        "  [4/5] RUN --mount=type=secret", "  fetching torch (858.1MiB)", "  fetching big (1.5GiB)",
        "  fetched torch, 1 of 2 large packages", "  Prepared 101 packages in 1m 53s",
    ]  # fmt: skip


def test_the_largest_packages_are_named_with_their_sizes(tmp_path: Path) -> None:
    packages_dir = tmp_path / "lib" / "python3.11" / "site-packages"
    for name, mib in {"torch": 3, "small": 1}.items():
        (packages_dir / name).mkdir(parents=True)
        (packages_dir / name / "file").write_bytes(os.urandom(mib << 20))
    shown = subprocess.run(
        [REPO_DIR / "scripts" / "largest", tmp_path], capture_output=True, text=True, check=True
    ).stdout
    assert re.fullmatch(rf"{tmp_path}: 0\.0 GB, of it in GB: torch 0\.0, small 0\.0\n", shown)


@pytest.mark.parametrize(("code", "signal_number"), [(130, 2), (143, 15), (1, None)])
def test_make_ends_by_the_signal_that_ended_a_container(code: int, signal_number: int | None) -> None:
    """Its own exit code is 2, whatever that of its recipe is. scripts/container ends as its client does."""
    stand_ins = Path(__file__).with_name("stand_ins_client")  # in the repository: a container's /tmp executes nothing
    makefile = f"job: ; @export OWNER=$$PPID; exec {REPO_DIR}/scripts/container data\n"
    env = {**os.environ, "PATH": f"{stand_ins}:{os.environ['PATH']}", "CLIENT_CODE": str(code)}
    ended = subprocess.run(
        ["make", "-f", "-", "job"], input=makefile, env=env, capture_output=True, text=True, check=False
    )
    assert f"Error {code}" in ended.stderr
    assert ended.returncode == (2 if signal_number is None else -signal_number)


@pytest.mark.parametrize("code", [0, 143])
def test_a_job_that_a_signal_finds_ends_as_it_says_itself(tmp_path: Path, code: int) -> None:
    """What ended well just then is done, and not stopped."""
    stand_ins, stopped = Path(__file__).with_name("stand_ins_client"), tmp_path / "stopped"
    kept = {name: value for name, value in os.environ.items() if name != "OWNER"}
    env = {**kept, "PATH": f"{stand_ins}:{os.environ['PATH']}", "CLIENT_CODE": str(code), "STOPPED": str(stopped)}
    command = [str(REPO_DIR / "scripts" / "container"), "data"]
    with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as job:
        while not stopped.with_name("stopped.begun").exists():
            assert job.poll() is None
            time.sleep(0.05)
        job.terminate()
        job.communicate()
    assert stopped.exists()
    assert job.returncode == code


def test_a_sweep_in_the_container_sees_its_scheme_files(tmp_path: Path) -> None:
    file = tmp_path / "its own.yaml"
    file.touch()
    result = make("sweep", f"SCHEMES=w4a16 '{file}'", "SEEDS=0 1", **IN_DOCKER)
    assert result.returncode == 0, result.stderr
    assert f"<{file}:/host{file}:ro>" in result.stdout
    words = re.findall("^SWEEP: (.*) x (.*)$", result.stdout, re.MULTILINE)[0]
    assert list(map(shlex.split, words)) == [["w4a16", f"/host{file}"], ["0", "1"]]
    assert "run: sweep" in result.stdout


@pytest.mark.parametrize(
    ("target", "given", "said"),
    [
        ("sweep", ["SEEDS=0"], "SCHEMES is not given: make sweep SCHEMES="),
        ("sweep", ["SCHEMES=w4a16"], "SEEDS is not given: make sweep SCHEMES="),
        ("all", ["SEEDS=0"], "SCHEMES=... and SEEDS=... are for make sweep"),
    ],
)
def test_a_sweep_names_schemes_and_seeds(target: str, given: list[str], said: str) -> None:
    result = make(target, *given, RUNNER="local", ACCEL="cpu")
    assert result.returncode == 2
    assert said in result.stderr
