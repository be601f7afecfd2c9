"""Set-up on machines unlike this one: which Python is taken, what happens without nvcc or without disk."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import bootstrap  # noqa: E402
import toolchain  # noqa: E402

BUILD_VARIABLES = ("MEGAMOE_SKIP_CUDA_BUILD", "MEGAMOE_FORCE_CUDA_BUILD", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bare_machine(tmp_path):
    """A PATH that holds no Python, and a home: `run(**variables)` starts a copy of scripts/bootstrap there."""
    home, tools, scripts = (tmp_path / name for name in ("home", "bin", "project/scripts"))
    for folder in (home, tools, scripts):
        folder.mkdir(parents=True)
    for tool in ("sh", "dirname", "ls"):
        (tools / tool).symlink_to(shutil.which(tool))
    shutil.copy(ROOT / "scripts" / "bootstrap", scripts)

    def run(*arguments, **variables):
        environment = {"PATH": str(tools), "HOME": str(home), **variables}
        command = ["sh", str(scripts / "bootstrap"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    run.home, run.tools, run.scripts = home, tools, scripts
    return run


def fake_python(path: Path, says: str, status: int = 0) -> None:
    """A Python that answers the question what it is with `says`, and prints its arguments for anything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo "{says}"; exit {status}; fi\necho "$0 runs $*"\n')
    path.chmod(0o755)


def test_no_python_is_one_clear_line(bare_machine):
    answer = bare_machine()
    assert answer.returncode == 1 and len(answer.stderr.splitlines()) == 1
    assert "no Python >= 3.12 found (no Python at all)" in answer.stderr and "MEGAMOE_PYTHON=" in answer.stderr


def test_the_line_names_what_was_tried(bare_machine):
    fake_python(bare_machine.tools / "python3", "3.9.2")
    fake_python(bare_machine.tools / "python3.12", "", status=127)  # a pyenv shim without a version behind it
    answer = bare_machine()
    assert answer.returncode == 1 and len(answer.stderr.splitlines()) == 1
    assert f"{bare_machine.tools}/python3 is 3.9.2" in answer.stderr and "python3.12 is" not in answer.stderr


@pytest.mark.parametrize(
    "place", [".pyenv/versions/3.12.7/bin/python", ".local/share/uv/python/cpython-3.12.7-linux-x86_64-gnu/bin/python3"]
)
def test_pythons_of_pyenv_and_uv_are_found(bare_machine, place):
    fake_python(bare_machine.tools / "python3", "3.11.2")
    fake_python(bare_machine.home / place, "ok")
    answer = bare_machine("test")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == f"{bare_machine.home / place} runs {bare_machine.scripts}/bootstrap.py test"


def test_uv_is_asked(bare_machine):
    fake_python(bare_machine.home / "elsewhere" / "python3.13", "ok")
    uv = bare_machine.tools / "uv"
    uv.write_text(
        f'#!/bin/sh\n[ "$*" = "python find --no-project >=3.12" ] && echo {bare_machine.home}/elsewhere/python3.13\n'
    )
    uv.chmod(0o755)
    assert "elsewhere/python3.13 runs" in bare_machine().stdout


def test_the_named_python_is_the_only_one_tried(bare_machine):
    fake_python(bare_machine.tools / "python3.12", "ok")
    fake_python(bare_machine.home / "old", "3.10.1")
    assert "is 3.10.1; needed" in bare_machine(MEGAMOE_PYTHON=str(bare_machine.home / "old")).stderr
    assert "not a Python that runs" in bare_machine(MEGAMOE_PYTHON=str(bare_machine.home / "none")).stderr
    fake_python(bare_machine.home / "new", "ok")
    assert bare_machine(MEGAMOE_PYTHON=str(bare_machine.home / "new")).stdout.startswith(
        f"{bare_machine.home}/new runs"
    )


def test_this_python_passes_as_usable(bare_machine):
    """The question itself, put to a real Python."""
    (bare_machine.scripts / "bootstrap.py").write_text("import sys; print('took', sys.version_info[:2] >= (3, 12))")
    assert bare_machine(MEGAMOE_PYTHON=sys.executable).stdout.strip() == "took True"


def test_a_full_disk_is_said_before_anything_is_downloaded(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 3 * 10**9))
    with pytest.raises(bootstrap.BootstrapError, match=r"disk too full: torch needs 8 GB under .*, 3\.0 GB are free"):
        bootstrap.check_disk()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 9 * 10**9))
    bootstrap.check_disk()


def test_large_downloads_are_announced_and_small_ones_not(capsys):
    bootstrap.announce("  Downloading https://host/x/torch-2.11.0-cp312-cp312-manylinux_2_28_x86_64.whl (530.7 MB)\n")
    bootstrap.announce("  Downloading sympy-1.14.0-py3-none-any.whl (6.3 MB)\n")
    bootstrap.announce("Installing collected packages: a, b, c\n")
    assert capsys.readouterr().out.splitlines() == [
        "    downloading torch 2.11.0 (530.7 MB)",
        "    unpacking 3 packages",
    ]


def test_an_installation_is_redone_when_what_decides_it_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    monkeypatch.setattr(bootstrap, "venv_works", lambda: True)
    assert not bootstrap.up_to_date(["test"])
    path, digest = bootstrap.stamp(["test"])
    path.write_text(digest)
    assert bootstrap.up_to_date(["test"]) and not bootstrap.up_to_date([])
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path / "moved")
    shutil.copytree(ROOT, tmp_path / "moved", ignore=lambda *_: shutil.ignore_patterns(".*", "build", "runs")(*_))
    assert not bootstrap.up_to_date(["test"]), "the project moved: its old place is written into the environment"


def test_another_architecture_is_refused_by_name(monkeypatch):
    for accepted in ("", "9.0a", " 9.0a;"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", accepted)
        toolchain.check_arch()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;12.0+PTX")
    with pytest.raises(toolchain.ToolchainError, match=r"asks for 8\.0, 12\.0\+PTX: .* 9\.0a \(Hopper\) only"):
        toolchain.check_arch()


def test_nvcc_of_another_release_is_passed_over_and_named(monkeypatch, tmp_path):
    for name, release in (("old", "12.4"), ("new", "13.1")):
        fake_python(tmp_path / name / "bin" / "nvcc", "")
        (tmp_path / name / "bin" / "nvcc").write_text(
            f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V"\n'
        )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "new"))
    assert toolchain.find_nvcc() == (str(tmp_path / "new/bin/nvcc"), "13.1")
    of_variables = [item for item in toolchain._nvcc_candidates() if item[0] == "CUDA_HOME"]
    monkeypatch.setattr(toolchain, "_nvcc_candidates", lambda: of_variables)
    with pytest.raises(toolchain.ToolchainError, match=r"no nvcc \(.*old/bin/nvcc is release 12\.4, needed is 13\.x\)"):
        toolchain.find_nvcc()


@pytest.mark.parametrize(
    ("skip", "force", "gpu", "required"),
    [("0", "0", False, False), ("0", "0", True, True), ("0", "1", False, True), ("1", "0", True, False)],
)
def test_when_kernels_are_required(monkeypatch, skip, force, gpu, required):
    monkeypatch.setenv("MEGAMOE_SKIP_CUDA_BUILD", skip)
    monkeypatch.setenv("MEGAMOE_FORCE_CUDA_BUILD", force)
    monkeypatch.setattr(toolchain, "gpu_present", lambda: gpu)
    monkeypatch.setattr(toolchain, "_nvcc_candidates", lambda: [])
    assert toolchain.kernels_required() is required
    assert (toolchain.NVCC_REQUIREMENT in toolchain.missing_requirements()) is required


def test_contradicting_and_unreadable_variables_are_refused(monkeypatch):
    monkeypatch.setenv("MEGAMOE_SKIP_CUDA_BUILD", "yes")
    with pytest.raises(toolchain.ToolchainError, match="MEGAMOE_SKIP_CUDA_BUILD: got 'yes'"):
        toolchain.kernels_required()
    monkeypatch.setenv("MEGAMOE_SKIP_CUDA_BUILD", "1")
    monkeypatch.setenv("MEGAMOE_FORCE_CUDA_BUILD", "1")
    with pytest.raises(toolchain.ToolchainError, match="both set"):
        toolchain.kernels_required()


@pytest.mark.parametrize(("outcome", "status"), [("7 passed in 0.01s", 0), ("1 failed, 6 passed in 2.00s", 2)])
def test_ci_ends_with_the_closing_line_of_pytest(tmp_path, outcome, status):
    closing = f"======== {outcome} ========"
    (tmp_path / "Makefile").write_text(
        f"test:\n\t@echo '{closing}'\n\t@echo $$MEGAMOE_FORCE_CUDA_BUILD; exit {status}\n"
    )
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    answer = subprocess.run([str(tmp_path / ".ci" / "run")], capture_output=True, text=True, cwd="/")
    lines = answer.stdout.splitlines()
    assert lines[-1] == closing and "1" in lines
    assert answer.returncode == status  # make's own status for a failed target is 2


def test_ci_says_so_when_pytest_never_ran(tmp_path):
    (tmp_path / "Makefile").write_text("test:\n\t@exit 1\n")
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    answer = subprocess.run([str(tmp_path / ".ci" / "run")], capture_output=True, text=True)
    assert answer.returncode != 0 and "before pytest could close" in answer.stdout.splitlines()[-1]
