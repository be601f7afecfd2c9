"""The doctor always prints: with a broken torch, a broken extension, an apex of the wrong project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamoe_train import doctor, extension, reference, versions

ROOT = Path(__file__).resolve().parent.parent


def run_doctor(*arguments: str, first_on_path: Path | None = None) -> str:
    """Standard output of the command, which must exit 0."""
    path = os.pathsep.join(str(folder) for folder in (first_on_path, ROOT) if folder)
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "megamoe_train.doctor", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True).stdout


def test_text_and_json_hold_every_section():
    report = json.loads(run_doctor("--json"))
    assert list(report) == list(doctor.PROBES)
    assert not [name for name, section in report.items() if "probe failed" in section]
    assert all(section for section in report.values())
    assert report["backend"]["reference"].startswith("reference: ")
    assert report["versions"]["torch"] == versions.version_state("torch").describe().split(" ", 1)[1]


def test_it_prints_where_torch_does_not_import(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    printed = run_doctor(first_on_path=tmp_path)
    assert printed.count("probe failed: OSError: libtorch_cpu.so: cannot open shared object file") == 4
    for heading in doctor.PROBES:
        assert f"\n{heading}\n" in f"\n{printed}"
    assert f"  torch: {versions.installed_version('torch')}" in printed


def test_a_probe_that_exits_only_fails_itself(monkeypatch):
    def leave():
        raise SystemExit(1)

    monkeypatch.setattr(doctor, "PROBES", {"one": leave, "two": lambda: {"key": "value"}})
    assert doctor.examine() == {"one": {"probe failed": "SystemExit: 1"}, "two": {"key": "value"}}


def test_without_peers_there_is_no_fabric(monkeypatch):
    assert doctor.probe_fabric() == {"fabric": "none: no GPU"} or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert doctor.probe_fabric() == {"fabric": "none: one GPU, which has no peer"}


@pytest.mark.parametrize(
    ("child", "expected"),
    [
        (
            "print('noise'); print('{\"GPU 0: pull by SMs from 1\": \"335 GB/s\"}')",
            ("GPU 0: pull by SMs from 1", "335 GB/s"),
        ),
        ("raise RuntimeError('no rendezvous')", ("measured", "failed: RuntimeError: no rendezvous")),
        ("import time; time.sleep(60)", ("measured", "nothing after 5 s: the fabric hangs")),
    ],
)
def test_the_fabric_is_measured_apart(monkeypatch, tmp_path, child, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(doctor, "CHILD_TIMEOUT_S", 5)
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{child}\n")
    program.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(program))
    smi = "#!/bin/sh\nprintf '\\tGPU0\\tGPU1\\nGPU0\\t X \\tNV18\\nGPU1\\tNV18\\t X \\n\\nLegend:\\n'\n"
    (tmp_path / "nvidia-smi").write_text(smi)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    section = doctor.probe_fabric()
    assert section["links (nvidia-smi topo -m)"] == ["GPU0\tGPU1", "GPU0\t X \tNV18", "GPU1\tNV18\t X"]
    assert section[expected[0]] == expected[1]


def test_lists_print_one_line_each():
    assert doctor._text({"a": {"gpus": ["x", "y"], "b": 1}}) == "a\n  gpus: x\n  gpus: y\n  b: 1"


@pytest.fixture
def package(monkeypatch, tmp_path) -> Path:
    """A checkout of our own: the extension's folder and csrc beside it."""
    folder = tmp_path / "megamoe_train"
    folder.mkdir()
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(extension, "PACKAGE", folder)
    return folder


def test_no_extension(package):
    assert doctor.probe_extension()["state"] == f"the CUDA extension is not built (no _C*.so in {package})"


def test_an_extension_that_does_not_load_says_why(package):
    (package / "_C.abi3.so").write_bytes(b"not an ELF file")
    expected = f"no: OSError: {package / '_C.abi3.so'}: file too short"
    assert doctor.probe_extension()["_C.abi3.so loads"] == expected


def test_a_stale_extension_names_the_newer_sources(package, monkeypatch):
    monkeypatch.setattr(doctor, "_run_apart", lambda code: "yes")
    built, source = package / "_C.so", package.parent / "csrc" / "bindings.cpp"
    for file, moment in ((source, 100), (built, 200)):
        file.write_bytes(b"")
        os.utime(file, (moment, moment))
    assert "_C.so is stale" not in doctor.probe_extension()
    os.utime(source, (300, 300))
    assert doctor.probe_extension()["_C.so is stale"] == "csrc/bindings.cpp changed since; install again"


def test_what_runs_apart_cannot_take_the_doctor_along(monkeypatch):
    assert doctor._run_apart("pass") == "yes"
    assert doctor._run_apart("raise ValueError('why')") == "no: ValueError: why"
    assert doctor._run_apart("import os; os.abort()") == "no: exit status -6"
    monkeypatch.setattr(doctor, "CHILD_TIMEOUT_S", 1)
    assert doctor._run_apart("import time; time.sleep(60)") == "no: nothing after 1 s"


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        (None, "not installed"),
        ("optimizers", "NVIDIA's apex unknown version in "),
        ("scaffolds", "holds another project of that name (unknown version), not NVIDIA's apex: `pip uninstall apex`"),
    ],
)
def test_apex_is_told_apart_by_contents(monkeypatch, tmp_path, inside, expected):
    if inside:
        (tmp_path / "apex" / inside).mkdir(parents=True)
        (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('never imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(versions, "installed_version", lambda name: None)
    assert expected in doctor.probe_apex()["state"]


def test_unknown_variables_are_pointed_out(monkeypatch):
    monkeypatch.setenv("MEGAMOE_SKIP_CUDA_BUILD", "1")
    monkeypatch.setenv("MEGAMOE_SKIP_CUDA_BUID", "1")
    section = doctor.probe_environment()
    assert section["MEGAMOE_SKIP_CUDA_BUILD"] == "1"
    assert section["MEGAMOE_SKIP_CUDA_BUID"] == "1 (unknown: nothing reads it)"


def test_the_self_test_sees_a_wrong_layer(monkeypatch):
    assert doctor._self_test("cpu", "reference").startswith("passed on reference (cpu, bf16): ")
    monkeypatch.setattr(reference, "weigh", lambda act, p, dtype: act.to(dtype))
    assert doctor._self_test("cpu", "reference").startswith("FAILED on reference (cpu, bf16): ")
