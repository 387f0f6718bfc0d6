"""The job on a cluster, as docs/cluster has it: what SLURM's and Kubeflow's variables make of it, with stand-ins."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.__main__ import ORDER, parse

REPO_DIR = Path(__file__).resolve().parents[2]
CLUSTER_DIR = REPO_DIR / "docs" / "cluster"
STAND_INS = Path(__file__).with_name("stand_ins_cluster")  # in the repository: a container's /tmp executes nothing


def calls(file: Path, command: list[str], **variables: str) -> list[list[str]]:
    """Runs a script; returns the calls of torchrun and python, noted in `file`: name, WORLD_SIZE, words."""
    file.write_text("")
    env = {"PATH": f"{STAND_INS}:{os.environ['PATH']}", "CALLS": str(file), **variables}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [line.split("|", 2) for line in file.read_text().splitlines()]


def stages(words: list[str]) -> list[str]:
    """The stages that command lines start, each of them parsed as `python -m app` does."""
    found = []
    for text in words:
        args = parse(text.partition("app ")[2].split())
        assert args.run == "full"
        assert args.set == ["data.coco_dir=/data/coco"]
        found.append(f"{args.stage} --variant {args.variant}" if args.stage == "train" else args.stage)
    return found


def torchrun_words(node: int, port: int, address: str) -> str:
    place = f"--node-rank={node} --master-addr={address} --master-port={port}"
    return f"--nnodes=2 --nproc-per-node=8 {place} -m -- app train "


def test_slurm_runs_every_stage_and_a_training_on_each_node(tmp_path: Path) -> None:
    variables = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "4217",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    made = calls(tmp_path / "calls", ["bash", str(CLUSTER_DIR / "slurm.sh")], COCO_DIR="/data/coco", **variables)
    trainings = [words for name, _, words in made if name == "torchrun"]
    for number, words in enumerate(trainings):
        assert words.startswith(torchrun_words(number % 2, 29717, "node-a"))
    assert stages(trainings) == ["train --variant fp16"] * 2 + ["train --variant qat"] * 2
    every_node_once = [words for name, _, words in made if name == "python"] + trainings[::2]
    assert sorted(stages(every_node_once)) == sorted(ORDER)
    assert stages([words for _, _, words in made])[0] == "data"


def test_a_slurm_job_without_a_dataset_says_so(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)}
    result = subprocess.run(
        ["bash", str(CLUSTER_DIR / "slurm.sh")], env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "COCO_DIR: name the COCO folder" in result.stderr


def pytorchjob() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER_DIR / "pytorchjob.yaml").read_text())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pod_trains_and_the_master_does_the_rest_alone(tmp_path: Path, rank: int) -> None:
    spec = pytorchjob()["spec"]["pytorchReplicaSpecs"]["Worker" if rank else "Master"]
    container = spec["template"]["spec"]["containers"][0]
    variables = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "w4a16-master-0", "MASTER_PORT": "23456"}
    made = calls(tmp_path / "calls", [*container["command"], *container["args"]], **variables)
    trainings, rest = made[:2], made[2:]
    assert all(words.startswith(torchrun_words(rank, 23456, "w4a16-master-0")) for _, _, words in trainings)
    done = stages([words for _, _, words in made])
    # A training prepares the dataset itself. The others must not see the variables of several processes.
    assert done == (list(ORDER[1:3]) if rank else list(ORDER[1:]))
    assert all(world_size == "" for _, world_size, _ in rest)


def test_the_pytorchjob_has_what_the_operator_and_the_image_ask_for() -> None:
    job = pytorchjob()
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert "nprocPerNode" not in job["spec"], "WORLD_SIZE would count processes, not pods"
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        container = pod["containers"][0]
        assert container["name"] == "pytorch"
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert set(mounts) == {"/data/coco", "/src/runs", "/cache", "/dev/shm"}  # noqa: S108 - where it is mounted
        assert mounts["/data/coco"]["readOnly"]
        assert replica["restartPolicy"] == "OnFailure"
