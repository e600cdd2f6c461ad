"""Tests of the launch files, with stand-ins for cluster commands that run what they are given."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import cli

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])

# What `srun` sets, for two tasks on this machine.
SRUN = """#!{python}
import os, subprocess, sys
step = dict(SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NODELIST="127.0.0.1")
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | step | dict(SLURM_PROCID=i, SLURM_LOCALID=i))
    for i in "01"
]
open("pids", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""

# Two hosts are folders of this machine; the queue's states are lines of a file.
GCLOUD = """#!{python}
import os, shlex, shutil, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
with open("gcloud.log", "a") as log:
    log.write(" ".join(words[2:]) + "\\n")
flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
hosts = [Path("host0"), Path("host1")]
assert flags["zone"] == "here", words
states = Path("states").read_text().split()
if words[3] == "describe":
    print(states[0] if states[0] != "NONE" else "")
    Path("states").write_text(" ".join(states[1:] or states))
elif words[3] == "scp":
    for host in hosts:
        shutil.copy(words[4], host / words[5].split(":")[1])
elif words[3] == "ssh":
    common = dict(JAX_COORDINATOR_ADDRESS="127.0.0.1:{port}", JAX_NUM_PROCESSES="2")
    worker = flags["worker"]
    running = [
        subprocess.Popen(
            ["bash", "-c", flags["command"]],
            cwd=host,
            env=os.environ | common | dict(HOME=str(host.resolve()), JAX_PROCESS_ID=str(i)),
        )
        for i, host in enumerate(hosts)
        if worker in ("all", str(i))
    ]
    sys.exit(max(host.wait() for host in running))
"""

# Makes environments that need no installation.
PYTHON3 = """#!/bin/bash
if [ "$FAILING" ]; then exit 1; fi
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp {job} "$3/bin/singer-jax" ;;
  "-m pip") echo "$@" >>"$HOME/pip.log" ;;
  *) exec {python} "$@" ;;
esac
"""
UV = """#!/bin/bash
if [ "$1 $2" = "python find" ]; then command -v python3; fi
"""


def write(path: Path, text: str, **values: object) -> Path:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def stand_ins(folder: Path, **commands: str) -> dict[str, str]:
    """Returns an environment in which these commands come first in PATH."""
    for name, text in commands.items():
        write(folder / "bin" / name, text, python=sys.executable)
    environment = cli.environment(quickly=True)
    return environment | {"PATH": f"{folder / 'bin'}:{environment['PATH']}"}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, "-x", f"--source-path={LAUNCH}", script], check=True)


JOB = str(os.getpid())


class TestSlurm:
    SCRIPT = (str(LAUNCH / "slurm.sbatch"),)

    @pytest.fixture
    def environment(self, tmp_path):
        recorded = '#!/bin/bash\necho "$@" >>scontrol.log\n'
        return stand_ins(tmp_path, srun=SRUN, scontrol=recorded) | {
            "SLURM_JOB_ID": JOB,  # from which JAX makes the port
            "SLURM_NTASKS": "2",
            "PYTHON": sys.executable,
        }

    def start(self, tmp_path, environment, *arguments):
        return subprocess.Popen(
            ["bash", *self.SCRIPT, *arguments],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @pytest.mark.parametrize(
        ("whom", "real"),
        [
            ("tasks", False),
            pytest.param("all", False, marks=pytest.mark.slow),
            pytest.param("tasks", True, marks=pytest.mark.slow),
        ],
    )
    def test_time_is_up(self, tmp_path, environment, whom, real):
        """SIGTERM reaches the tasks (time limit) or all (preemption); the run is requeued."""
        config, workdir = cli.write_config(tmp_path), tmp_path / "run"
        arguments = [f"--config={config}", f"--workdir={workdir}", "--config.mesh.data=2"]
        if not real:
            # Everything but the module that is started.
            python = f'#!/bin/bash\nexec {sys.executable} -m {cli.LOOP[1]} "${{@:3}}"\n'
            environment = environment | {"PYTHON": str(write(tmp_path / "python", python))}
        job = self.start(tmp_path, cli.held(environment, 6), *arguments)
        cli.wait_for_step(job, workdir, 4)
        pids = list(map(int, (tmp_path / "pids").read_text().split()))
        for pid in pids + [job.pid] * (whom == "all"):
            os.kill(pid, signal.SIGTERM)
        status, printed = cli.finish(job)
        assert status == 75, printed
        assert lines(tmp_path / "scontrol.log") == [f"requeue {JOB}"]

        status, printed = cli.finish(self.start(tmp_path, environment, *arguments))
        assert status == 0, printed
        assert "continuing after step" in printed
        assert lines(tmp_path / "scontrol.log") == [f"requeue {JOB}"]
        assert (workdir / "student" / "model.safetensors").exists()

    def test_an_invalid_configuration_is_not_requeued(self, tmp_path, environment):
        job = self.start(tmp_path, environment, "--config=nothing.py", f"--workdir={tmp_path}")
        status, printed = cli.finish(job)
        assert status == 2
        assert "--config: no file nothing.py" in printed
        assert not (tmp_path / "scontrol.log").exists()

    def test_no_python(self, tmp_path, environment):
        del environment["PYTHON"]
        status, printed = cli.finish(self.start(tmp_path, environment))
        assert status == 2
        assert "no .venv/bin/python" in printed


class TestTpuPod:
    WORKDIR = "--workdir=gs://bucket/my run"

    def run(self, folder, job, *arguments, states="NONE PROVISIONING ACTIVE", **variables):
        """Runs the script on hosts whose `singer-jax` is the shell script `job`."""
        shutil.copytree(LAUNCH, folder / "checkout" / "launch")
        for name in ("singer_jax", "configs", "tests"):
            (folder / "checkout" / name).symlink_to(ROOT / name)
        for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder / "checkout" / name)
        checkout = folder / "checkout"
        job = write(folder / "job", f"#!/bin/bash\n{job}\n")
        environment = stand_ins(
            folder,
            gcloud=GCLOUD.replace("{port}", str(cli.free_port())),
            python3=PYTHON3.replace("{job}", str(job)),
            pkill='#!/bin/bash\necho "$@" >>"$HOME/pkill.log"\n',
            pgrep="#!/bin/bash\nexit 1\n",
        )
        for host in ("host0", "host1"):
            write(checkout / host / ".local" / "bin" / "uv", UV)
        (checkout / "states").write_text(states)
        return subprocess.run(
            ["bash", "launch/tpu_pod.sh", *arguments],
            cwd=checkout,
            env=environment | {"ZONE": "here", "TPU": "v5litepod-16", "POLL": "0"} | variables,
            capture_output=True,
            text=True,
            timeout=cli.PATIENCE,
        )

    def asked(self, folder):
        """Returns the requests to the service, without those for installation and state."""
        log = lines(folder / "checkout" / "gcloud.log")
        return [re.sub(" --zone=here| --format.*", "", line) for line in log]

    def test_from_asking_to_giving_back(self, tmp_path):
        record = 'printf "%s\\n" "$PWD" "$@" "$IMAGES" >>"$HOME/job.log"'
        done = self.run(
            tmp_path,
            record,
            "my-run",
            self.WORKDIR,
            "--config.method.name=fitnet",
            SPOT="1",
            SETUP="export IMAGES='mounted here'",
        )
        assert done.returncode == 0, done.stderr
        asked = self.asked(tmp_path)
        assert asked[0] == "queued-resources describe my-run"
        assert asked[1] == (
            "queued-resources create my-run --node-id=my-run --accelerator-type=v5litepod-16 "
            "--runtime-version=v2-alpha-tpuv5-lite --spot"
        )
        assert asked[-1] == "queued-resources delete my-run --force --quiet"
        for number in "01":
            host = tmp_path / "checkout" / f"host{number}"
            given = [self.WORKDIR, "--config.method.name=fitnet", "mounted here"]
            assert lines(host / "job.log") == [str(host / "singer_jax"), *given]
            assert (host / "singer_jax" / "singer_jax" / "main.py").exists()
            installed = " ".join(lines(host / "pip.log"))
            assert "--user uv" in installed and "--editable .[tpu,gcs]" in installed

    def test_again_after_a_preemption(self, tmp_path):
        """The first start ends with 75, and the slice no longer exists at the next query."""
        job = 'echo x >>"$HOME/starts"; [ "$(wc -l <"$HOME/starts")" = 2 ] || exit 75'
        done = self.run(tmp_path, job, "a", self.WORKDIR, states="ACTIVE SUSPENDED NONE ACTIVE")
        assert done.returncode == 0, done.stderr
        asked = [line.split()[1] for line in self.asked(tmp_path) if line.startswith("queued")]
        assert asked == [*["describe"] * 2, "delete", "describe", "create", "describe", "delete"]
        assert len(lines(tmp_path / "checkout" / "host1" / "starts")) == 2

    @pytest.mark.parametrize("status", [1, 2])
    def test_a_failure_keeps_the_slice(self, tmp_path, status):
        done = self.run(tmp_path, f"exit {status}", "my-run", self.WORKDIR, states="ACTIVE")
        assert done.returncode == status
        assert f"status {status}; the slice is kept" in done.stderr
        assert not [line for line in self.asked(tmp_path) if " delete " in line]

    def test_a_setup_that_fails(self, tmp_path):
        done = self.run(tmp_path, "true", "a", self.WORKDIR, states="ACTIVE", SETUP="false")
        assert done.returncode == 1
        assert "status 1; the slice is kept" in done.stderr

    def test_an_installation_that_fails(self, tmp_path):
        """A connection that is lost repeatedly has the same effect."""
        done = self.run(tmp_path, "true", "a", self.WORKDIR, states="ACTIVE", FAILING="1")
        assert done.returncode == 1
        assert "five times in a row" in done.stderr
        assert not [line for line in self.asked(tmp_path) if " delete " in line]

    def test_a_slice_that_cannot_be_made(self, tmp_path):
        done = self.run(tmp_path, "", "my-run", self.WORKDIR, states="NONE FAILED")
        assert done.returncode == 1
        assert "could not be made" in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "variables", "named"),
        [
            ((), {}, "give a name"),
            (("--config=x",), {}, "give a name"),
            (("a", WORKDIR), {"ZONE": ""}, "ZONE: not set"),
            (("a", WORKDIR), {"TPU": ""}, "TPU: not set"),
            (("a", "--workdir=runs/a"), {}, "--workdir: give gs://"),
        ],
    )
    def test_invalid_arguments(self, tmp_path, arguments, variables, named):
        done = self.run(tmp_path, "", *arguments, **variables)
        assert done.returncode == 2
        assert named in done.stderr
        assert not self.asked(tmp_path)

    @pytest.mark.parametrize(
        "program", [cli.LOOP, pytest.param(cli.PROGRAM, marks=pytest.mark.slow)]
    )
    def test_two_hosts_train_together(self, tmp_path, program):
        """A folder stands in for the job's bucket."""
        config, workdir = cli.write_config(tmp_path), tmp_path / "run"
        flags = f'"--workdir={workdir}" --config={config} --config.mesh.data=2 --config.steps=2'
        job = f'cd {ROOT} && {sys.executable} {" ".join(program)} {flags} 2>"$HOME/log"'
        done = self.run(tmp_path, job, "a", self.WORKDIR, states="ACTIVE")
        log = (tmp_path / "checkout" / "host0" / "log").read_text()
        assert done.returncode == 0, done.stderr + log
        assert "2 steps done, student exported" in log
        assert cli.steps(workdir)[-1] == 2


class TestJobSet:
    @pytest.fixture
    def given(self):
        return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())

    @pytest.mark.slow
    def test_schema(self, given):
        """The objects are equal after reading and writing, so that the schema knows all fields."""
        from kubeflow_trainer_api import models  # thousands of classes

        read = models.JobsetV1alpha2JobSet.from_dict(given)
        written = json.loads(json.dumps(read.to_dict(), default=str))
        assert without_empty(written) == without_empty(given)

    def test_restarts(self, given):
        """Status 75 fails the job with the reason for which the set restarts without counting."""
        policy = given["spec"]["failurePolicy"]
        (job,) = given["spec"]["replicatedJobs"]
        job = job["template"]["spec"]
        (rule,) = policy["rules"]
        assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
        stopped, evicted = job["podFailurePolicy"]["rules"]
        assert stopped["action"] == evicted["action"] == "FailJob"
        (container,) = job["template"]["spec"]["containers"]
        codes = stopped["onExitCodes"]
        assert codes == {"containerName": container["name"], "operator": "In", "values": [75]}
        assert job["template"]["spec"]["restartPolicy"] == "Never"  # what the policy asks for

    def test_processes(self, given):
        """The job has one process per pod, and the first pod is the coordinator."""
        (hosts,) = given["spec"]["replicatedJobs"]
        job, set_name = hosts["template"]["spec"], given["metadata"]["name"]
        (container,) = job["template"]["spec"]["containers"]
        environment = {one["name"]: one.get("value") for one in container["env"]}
        assert job["completions"] == job["parallelism"] == int(environment["JAX_NUM_PROCESSES"])
        host = environment["JAX_COORDINATOR_ADDRESS"].split(":")[0]
        assert host == f"{set_name}-{hosts['name']}-0-0.{set_name}"
        # Chips a host x hosts are those of the topology.
        side = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        rows, columns = map(int, side.split("x"))
        chips = container["resources"]["limits"]["google.com/tpu"]
        assert rows * columns == chips * job["completions"]


def without_empty(tree):
    """Returns mappings without values that are None or empty; quantities become floats."""
    if isinstance(tree, dict):
        kept = {key: without_empty(value) for key, value in tree.items()}
        return {key: value for key, value in kept.items() if value not in (None, {}, [])}
    if isinstance(tree, list):
        return [without_empty(item) for item in tree]
    return float(tree) if type(tree) is int else tree


def test_dockerfile():
    """It copies existing files and installs existing extras; its program receives the signals."""
    import tomllib

    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (run,) = [line for line in lines if line.startswith("RUN")]
    extras = re.search(r"\[(.*)\]", run)[1].split(",")
    assert {"tpu", "gpu", *extras} - {"${EXTRA}"} <= set(project["optional-dependencies"])
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT")]
    assert json.loads(entry.split(" ", 1)[1]) == list(project["scripts"])
