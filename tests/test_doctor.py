"""What `python -m pasta_jax.doctor` says of machines and installations, in order and not."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from pasta_jax import doctor
from pasta_jax.doctor import Finding, Requirement
from pasta_jax.memory import GIB
from tests.helpers.commands import ROOT, python
from tests.test_errors import machine_with_tpus
from tests.test_packaging import SETUP, pins

CPU = {"backend": "cpu", "kind": "cpu", "limits": [None]}
TPU = {"backend": "tpu", "kind": "TPU v5 lite", "limits": [16 * GIB] * 4}


def levels(findings: Iterable[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_every_finding_that_is_not_in_order_says_what_to_do(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LITTLE_DISK", 2**70)
    monkeypatch.setattr(os, "access", lambda *about: False)
    closed = str(tmp_path)
    gpu = tmp_path / "gpu"
    (gpu / "dev").mkdir(parents=True)
    (gpu / "dev/nvidia0").touch()
    tpus = str(machine_with_tpus(tmp_path / "tpu", held_by="python train.py"))
    old = Requirement("numpy", "99.0", "plot")
    found = {
        "problem": [
            doctor.python((3, 10, 4)),
            *[*doctor.packages([old, Requirement("no_such_package", "1.0")])][:2],
            *doctor.devices(None, "RuntimeError: jaxlib is older", root=closed, env={}),
            next(iter(doctor.devices(CPU, "", root=str(gpu), env={}))),
            next(iter(doctor.devices(CPU, "", root=tpus, env={}))),
            *doctor.disk({"this folder": "/no/such"}),
        ],
        "warning": [
            next(iter(doctor.devices(CPU, "", root=tpus, env={"JAX_PLATFORMS": "cpu"}))),
            doctor.memory(GIB, 8 * GIB),
            *doctor.disk({"this folder": closed}),
            doctor.cache(closed),
            doctor.cache(""),
            next(doctor.tokens({"HF_TOKEN": "hf_secret\n"})),
            next(doctor.extras([old])),
        ],
    }
    for level, findings in found.items():
        assert levels(findings) == [level] * len(findings)
        assert all(finding.advice for finding in findings)
        assert all("\n" not in finding.text + finding.advice for finding in findings)
        assert not any("hf_secret" in str(finding) for finding in findings), "values of tokens are not shown"
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "LITTLE_DISK", 2**70)
    assert levels(doctor.disk({"this folder": closed})) == ["warning"]
    assert "pid 1234 (python train.py) holds it" in found["problem"][-2].text


def test_findings_that_are_in_order(tmp_path: pathlib.Path) -> None:
    tpus = str(machine_with_tpus(tmp_path))
    found = [
        doctor.python((3, 12, 1)),
        *doctor.packages([Requirement("numpy", "1.0")]),
        *doctor.devices(TPU, "", root=tpus, env={}),
        doctor.memory(8 * GIB, 16 * GIB),
        doctor.memory(None, None),
        doctor.cache(str(tmp_path / "not/yet")),
        doctor.cache("gs://bucket/xla"),
        *doctor.tokens({"HF_TOKEN": "hf_secret"}),
        *doctor.extras([Requirement("numpy", "1.0", "plot"), Requirement("no_such_package", "1.0", "tb")]),
        *doctor.processes(tpus, {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}),
    ]
    assert set(levels(found)) == {"ok"}
    text = "\n".join(map(str, found))
    assert "4 x TPU v5 lite (tpu), 16.0 GiB each" in text and "process 1 of 2." in text
    assert "HF_TOKEN (models and data sets" in text and ") set;" in text and "hf_secret" not in text
    assert 'extras: plot; not installed: tb. To add one, in a clone: pip install -e ".[NAME]"' in text


def test_what_is_needed_is_what_setup_declares() -> None:
    found = doctor.requirements()
    core = {each.package: each.least for each in found if not each.extra}
    assert core == pins("\n".join(SETUP["install_requires"]), ">=")
    assert {each.extra for each in found} == {"", *SETUP["extras_require"]}
    assert not dataclasses.replace(found[0], least="0").is_old


def test_the_status_is_that_of_the_worst_finding(capsys: pytest.CaptureFixture[str]) -> None:
    ok, warning, problem = (Finding(level, "text", "Do it.") for level in ("ok", "warning", "problem"))
    assert (doctor.report(iter([ok])), doctor.report(iter([ok, warning]))) == (0, 0)
    assert capsys.readouterr().out.splitlines()[-1] == "1 warning."
    assert doctor.report(iter([problem, warning, problem])) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 problems and 1 warning."


def test_what_jax_says_is_asked_in_a_process_that_may_crash_or_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE", "print('a line'); print('{\"backend\": \"cpu\"}')")
    assert doctor.probe(os.environ) == ({"backend": "cpu"}, "")
    monkeypatch.setattr(doctor, "PROBE", "raise RuntimeError('Unable to initialize backend.')")
    assert doctor.probe(os.environ) == (None, "RuntimeError: Unable to initialize backend")
    monkeypatch.setattr(doctor, "PROBE", "import os; os.abort()")
    assert "status -6" in doctor.probe(os.environ)[1] or "Abort" in doctor.probe(os.environ)[1]
    monkeypatch.setattr(doctor, "PROBE", "import time; time.sleep(9)")
    monkeypatch.setattr(doctor, "PROBE_S", 0.2)
    assert "all must run the command at once" in doctor.probe(os.environ)[1]


@pytest.mark.slow
def test_the_command() -> None:
    done = python("-m", "pasta_jax.doctor", env={"HF_TOKEN": "hf_secret"})
    assert done.returncode == (1 if "\nproblem " in f"\n{done.stdout}" else 0) and done.stderr == ""
    assert "devices: 1 x cpu (cpu)" in done.stdout and "hf_secret" not in done.stdout
    done = python("-m", "pasta_jax.doctor", "runs/mine")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_it_works_where_nothing_is_installed() -> None:
    """Without jax, absl and numpy; it says that they are missing."""
    code = """if True:
        import importlib.metadata, runpy, sys
        lacking = {"absl", "jax", "jaxlib", "numpy", "flax"}
        class Lacking:
            def find_spec(self, name, *about):
                if name.partition(".")[0] in lacking:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        real = importlib.metadata.version
        def version(name):
            if name.partition("-")[0] in lacking:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)
        importlib.metadata.version = version
        sys.meta_path.insert(0, Lacking())
        runpy.run_module("pasta_jax.doctor", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == ""
    found: Any = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    assert [line.split()[1] for line in found] == ["absl-py", "flax", "jax", "numpy"]
    assert 'pip install "jax>=' in done.stdout and "devices" not in done.stdout
