"""The built image and the compose files, looked at from outside: `make test-container`. Standard library only."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

REPO_DIR = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get("IMAGE", "w4a16-detector:latest")
GPU_JOBS = ("train-fp16", "train-qat", "export", "ptq", "eval", "all", "smoke", "bench")
JOBS = (*GPU_JOBS, "data", "report", "compare", "test", "lint")
# Any uid will do; one without a name and without a home shows that none is needed. Only root may delete its files.
UID = 23456 if os.getuid() == 0 else os.getuid()
CPU_FILES = ("-f", "docker-compose.yml", "-f", "docker-compose.cpu.yml")
FILES_OF_A_CLONE = (".gitattributes", "Makefile", "Dockerfile", "docker-compose.yml", ".ci/run", "scripts/job")
GONE_WITHIN_S = 30.0  # the watcher looks once a second, TensorBoard stops at once; the rest is a busy machine

HARDENING = """
import json, os, socket
def errno_of(action):
    try:
        action()
    except OSError as error:
        return error.errno
def connect():
    socket.create_connection(("192.0.2.1", 80), timeout=3)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "uid": os.getuid(), "capabilities": int(status["CapEff"], 16), "no_new_privs": int(status["NoNewPrivs"]),
    "interfaces": os.listdir("/sys/class/net"), "connect": errno_of(connect),
    "code": errno_of(lambda: open("/src/app/new", "w")), "dataset": errno_of(lambda: open("/data/coco/new", "w")),
    "data": errno_of(lambda: open("/src/data/new", "w")),
}))
"""


def docker(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs docker in the repository; the caller looks at the exit code."""
    environment = {**os.environ, **(env or {})}
    command = ["docker", *args]
    return subprocess.run(command, cwd=REPO_DIR, env=environment, capture_output=True, text=True, check=False)


def compose_config(*files: str, **env: str) -> dict:
    result = docker("compose", *files, "--profile", "job", "config", "--format", "json", env=env)
    if result.returncode != 0:
        raise AssertionError(result.stderr)
    return json.loads(result.stdout)["services"]


class Compose(unittest.TestCase):
    def test_every_job_is_locked_down(self) -> None:
        for files in ((), CPU_FILES):
            services = compose_config(*files)
            for name in JOBS:
                service = services[name]
                self.assertTrue(service["read_only"] and service["init"], name)
                self.assertEqual(service["cap_drop"], ["ALL"], name)
                self.assertEqual(service["security_opt"], ["no-new-privileges:true"], name)
                self.assertEqual(service["network_mode"], "none", name)
                self.assertEqual(service["user"], "1000:1000", name)
                mounts = {mount["target"]: mount.get("read_only", False) for mount in service["volumes"]}
                self.assertEqual(
                    mounts, {"/src/runs": False, "/src/data": True, "/data/coco": True, "/cache": False}, name
                )

    def test_gpus_are_reserved_and_the_cpu_file_takes_them_away(self) -> None:
        with_gpu, without = compose_config(GPUS="2"), compose_config(*CPU_FILES)
        for name in GPU_JOBS:
            (device,) = with_gpu[name]["deploy"]["resources"]["reservations"]["devices"]
            self.assertEqual((device["driver"], device["count"]), ("nvidia", 2), name)
            self.assertNotIn("deploy", without[name], name)

    def test_up_starts_tensorboard_alone_on_loopback(self) -> None:
        result = docker("compose", "config", "--services")
        self.assertEqual(result.stdout.split(), ["tensorboard"])
        (port,) = compose_config()["tensorboard"]["ports"]
        self.assertEqual((port["host_ip"], port["published"]), ("127.0.0.1", "6006"))

    def test_no_service_needs_a_network_of_its_own(self) -> None:
        """Two commands at once would each make one, and compose would refuse the two of one name from then on."""
        modes = {name: service["network_mode"] for name, service in compose_config().items()}
        on_bridge = {name for name, mode in modes.items() if mode == "bridge"}
        self.assertEqual(on_bridge, {"tensorboard", "download-coco"})
        self.assertEqual(set(modes.values()), {"none", "bridge"})

    def test_compiled_kernels_are_shared_with_nobody(self) -> None:
        result = docker("compose", "--profile", "job", "config", "--format", "json", env={"APP_UID": "77"})
        self.assertEqual(json.loads(result.stdout)["volumes"]["cache"]["name"], "w4a16-detector-cache-77")

    def test_the_download_sees_the_dataset_folder_alone(self) -> None:
        mounts = {mount["target"] for mount in compose_config()["download-coco"]["volumes"]}
        self.assertEqual(mounts, {"/data/coco", "/mnt/ca_bundle"})

    def test_memory_of_a_job_can_be_limited(self) -> None:
        self.assertEqual(compose_config(MEM_LIMIT="24g")["all"]["mem_limit"], str(24 * 2**30))
        self.assertNotIn("mem_limit", compose_config()["all"])

    def test_container_and_venv_run_the_same_commands(self) -> None:
        coco_dir = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, coco_dir)
        args = "--set train.epochs=3 --set data.note='two *.md $(id) words; x'"
        for given in ("", coco_dir):
            services = compose_config(RUN="r", ARGS=args, COCO_DIR=given)
            for name in (*GPU_JOBS, "data", "report"):
                here = local_command(name, RUN="r", ARGS=args, COCO_DIR=given)
                here = [word.replace(coco_dir, "/data/coco") for word in here]
                there = [word.replace("$$", "$") for word in services[name]["command"]]  # as `config` writes a `$`
                self.assertEqual(sorted(here), sorted(there), name)
                self.assertEqual(here[-4:], shlex.split(args), "ARGS come last and override")

    def test_what_is_compared_or_scored_is_the_same_in_both(self) -> None:
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        for name, words in (("compare", {"A": folder, "B": folder}), ("eval", {"ONNX": f"{folder}/it's a.onnx"})):
            Path(folder, "it's a.onnx").touch()
            here = local_command(name, RUN="r", COCO_DIR="", **words)
            services = compose_config(RUN="r", **{key: value.replace("'", "'\\''") for key, value in words.items()})
            self.assertEqual(sorted(here), sorted(services[name]["command"]))


def local_command(target: str, **env: str) -> list[str]:
    """Arguments after `python -m app` that RUNNER=local gives, seen by a stand-in for the interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(REPO_DIR / "scripts", root / "scripts")
        (root / "requirements.lock").touch()
        (root / ".venv" / "bin").mkdir(parents=True)
        (root / ".venv" / ".from-lock").touch()
        python = root / ".venv" / "bin" / "python"
        python.write_text('#!/bin/sh\nshift 2; printf "%s\\n" "$@"\n')
        python.chmod(0o755)
        settings = {**os.environ, **env, "RUNNER": "local", "ACCEL": "cpu"}
        output = subprocess.run(
            [root / "scripts" / "job", target], env=settings, capture_output=True, text=True, check=True
        ).stdout
    _, _, words = output.partition("accel: cpu")  # the line that says which runner it is
    return words.splitlines()[1:]


@unittest.skipUnless(shutil.which("git"), "git makes the clone")
class Checkout(unittest.TestCase):
    def test_line_ends_are_lf_where_git_would_change_them(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in FILES_OF_A_CLONE:
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                shutil.copy(REPO_DIR / name, Path(folder) / name)
            git = ("git", "-C", folder, "-c", "core.autocrlf=true")
            subprocess.run([*git, "init"], check=True, capture_output=True)
            subprocess.run([*git, "add", "."], check=True, capture_output=True)
            for name in FILES_OF_A_CLONE[1:]:
                (Path(folder) / name).unlink()
            subprocess.run([*git, "checkout-index", "--all", "--force"], check=True, capture_output=True)
            for name in FILES_OF_A_CLONE:
                self.assertNotIn(b"\r", (Path(folder) / name).read_bytes(), name)


class Image(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.runs_dir, coco_dir = self.folder / "runs", self.folder / "coco"
        for path in (self.folder, self.runs_dir, coco_dir):
            path.mkdir(exist_ok=True)
            path.chmod(0o777)
        override = self.folder / "runs.json"
        volumes = [f"{self.runs_dir}:/src/runs"]
        override.write_text(json.dumps({"services": {"data": {"volumes": volumes}}}))
        self.run = ("compose", "-f", "docker-compose.yml", "-f", str(override), "run", "--rm", "-T")
        self.env = {"APP_UID": str(UID), "APP_GID": str(UID), "COCO_DIR": str(coco_dir), "ARGS": ""}

    def test_any_uid_without_rights_without_network(self) -> None:
        result = docker(*self.run, "--entrypoint", "python", "data", "-c", HARDENING, env=self.env)
        self.assertEqual(result.returncode, 0, result.stderr)
        found = json.loads(result.stdout)
        self.assertEqual((found["uid"], found["capabilities"], found["no_new_privs"]), (UID, 0, 1))
        self.assertEqual(found["interfaces"], ["lo"])
        self.assertEqual(found["connect"], 101, "ENETUNREACH")
        for place in ("code", "dataset", "data"):
            self.assertEqual(found[place], 30, f"EROFS: nobody writes to {place}")

    def test_files_belong_to_the_caller(self) -> None:
        command = ("data", "data", "--run", "t", "--conf", "conf/smoke.yaml")
        result = docker(*self.run, *command, env=self.env)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertTrue((self.runs_dir / "t" / "dataset" / "provenance.json").is_file())
        owners = {path.lstat().st_uid for path in self.runs_dir.rglob("*")}
        self.assertEqual(owners, {UID})

    def test_libraries_load_for_a_uid_without_a_name(self) -> None:
        code = "import torch, torchvision, brevitas, onnxruntime, pycocotools; print(torch._C._cuda_getArchFlags())"
        result = docker(*self.run, "--entrypoint", "python", "data", "-c", code, env=self.env)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("sm_120", result.stdout)

    def test_compiled_kernels_find_a_place_that_lasts(self) -> None:
        line = 'mkdir -p "$TRITON_CACHE_DIR" && cp /bin/true "$TRITON_CACHE_DIR/run" && "$TRITON_CACHE_DIR/run"'
        for uid in (UID, UID + 1):
            env = {**self.env, "APP_UID": str(uid)}
            result = docker(*self.run, "--entrypoint", "sh", "data", "-c", line, env=env)
            self.assertEqual(result.returncode, 0, result.stderr)
        self.addCleanup(docker, "volume", "rm", f"w4a16-detector-cache-{UID + 1}")
        again = docker(*self.run, "--entrypoint", "sh", "data", "-c", '"$TRITON_CACHE_DIR/run"', env=self.env)
        self.assertEqual(again.returncode, 0, again.stderr)

    def test_a_mistake_ends_with_2_and_one_line(self) -> None:
        result = docker(*self.run, "data", "data", "--run", "t", "--set", "train.epoch=1", env=self.env)
        self.assertEqual(result.returncode, 2)
        self.assertIn("did you mean train.epochs", result.stderr + result.stdout)

    def test_messages_name_the_dataset_as_the_user_does(self) -> None:
        result = docker(*self.run, "data", "data", "--run", "t", "--set", "data.coco_dir=/data/coco", env=self.env)
        self.assertEqual(result.returncode, 2)
        said = result.stderr + result.stdout
        self.assertIn(f"error: {self.folder}/coco holds no dataset in a known layout: ", said)
        self.assertNotIn("/data/coco", said.replace(f"{self.folder}/coco", ""))

    @unittest.skipUnless(os.getuid() == 0, "only root gives a folder to another user")
    def test_another_uid_is_told_which_variables_to_set(self) -> None:
        self.runs_dir.chmod(0o755)
        os.chown(self.runs_dir, UID, UID)
        env = {**self.env, "APP_UID": "", "APP_GID": ""}
        result = docker(*self.run, "data", "data", "--run", "t", "--conf", "conf/smoke.yaml", env=env)
        self.assertEqual(result.returncode, 2)
        self.assertIn(f"export APP_UID={UID} APP_GID={UID}", result.stderr + result.stdout)

    def test_no_layer_holds_a_secret(self) -> None:
        told = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE).stdout
        told += docker("image", "inspect", "-f", "{{json .Config}}", IMAGE).stdout
        for name in ("CA_BUNDLE", "PIP_INDEX_URL", "HTTPS_PROXY", "HTTP_PROXY"):
            if value := os.environ.get(name):
                self.assertNotIn(value, told, name)
        self.assertIsNone(re.search(r"https?://\S*@", told), "an address with a password")
        places = "/run/secrets /mnt /tmp /root/.config /root/.cache /etc/pip.conf /etc/uv"
        list_files = ("run", "--rm", "--entrypoint", "sh", "--user", "0", IMAGE, "-c", f"find {places} -type f")
        self.assertEqual(docker(*list_files).stdout, "")

    def test_labels_name_version_and_revision(self) -> None:
        labels = json.loads(docker("image", "inspect", "-f", "{{json .Config.Labels}}", IMAGE).stdout)
        version = re.search(r'^version = "(.*)"', (REPO_DIR / "pyproject.toml").read_text(), re.MULTILINE)
        assert version is not None
        self.assertEqual(labels["org.opencontainers.image.version"], version[1])
        self.assertNotIn(labels["org.opencontainers.image.revision"], ("", "unknown"))


class EndOfMake(unittest.TestCase):
    """However make ends, its container ends too. TensorBoard stands for all jobs: it runs until it is stopped."""

    def start(self) -> tuple[subprocess.Popen[bytes], str]:
        environment = {**os.environ, "RUNNER": "docker", "ACCEL": "cpu", "TENSORBOARD_PORT": "0"}
        before = running()
        make = subprocess.Popen(
            ["make", "tensorboard"], cwd=REPO_DIR, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=hear_ctrl_c,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        self.addCleanup(end, make)
        while not (new := running() - before):
            self.assertIsNone(make.poll(), "make ended before its container started")
            self.assertLess(time.monotonic(), deadline, "no container was started")
            time.sleep(0.2)
        return make, new.pop()

    def check_gone(self, container: str) -> None:
        deadline = time.monotonic() + GONE_WITHIN_S
        while container in running():
            self.assertLess(time.monotonic(), deadline, "the container is still running")
            time.sleep(0.2)

    def test_tensorboard_says_its_address_and_nothing_else(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "RUNNER": "docker", "ACCEL": "cpu", "TENSORBOARD_PORT": str(port)}
        make = subprocess.Popen(
            ["make", "--no-print-directory", "tensorboard"], cwd=REPO_DIR, env=environment, start_new_session=True,
            text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=hear_ctrl_c,
        )  # fmt: skip
        self.addCleanup(end, make)
        assert make.stdout is not None
        first = make.stdout.readline()
        make.terminate()
        rest, _ = make.communicate(timeout=GONE_WITHIN_S)
        self.assertEqual(first, f"http://localhost:{port}\n")
        self.assertRegex(rest, r"\A(make(\[\d+\])?: .*\n)*\Z")

    def test_terminated(self) -> None:
        make, container = self.start()
        make.terminate()
        self.assertNotEqual(make.wait(timeout=GONE_WITHIN_S), 0)
        self.assertNotIn(container, running(), "make waits for its container")

    def test_interrupted(self) -> None:
        make, container = self.start()
        os.killpg(make.pid, signal.SIGINT)
        self.assertNotEqual(make.wait(timeout=GONE_WITHIN_S), 0)
        self.check_gone(container)

    def test_killed_with_all_its_children(self) -> None:
        make, container = self.start()
        os.killpg(make.pid, signal.SIGKILL)
        make.wait()
        self.check_gone(container)

    def test_make_alone_killed(self) -> None:
        make, container = self.start()
        make.kill()
        make.wait()
        self.check_gone(container)


def hear_ctrl_c() -> None:
    """A shell that starts these tests in the background (`... &`) has them ignore it, and all their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(make: subprocess.Popen[bytes]) -> None:
    """Ends a make that a failed test has left behind; its watcher sees to the container."""
    if make.poll() is None:
        make.kill()
        make.wait()


def running() -> set[str]:
    label = f"label=com.docker.compose.project.working_dir={REPO_DIR}"
    return set(docker("ps", "-q", "--filter", label).stdout.split())


if __name__ == "__main__":
    unittest.main()
