"""setup.py builds a tiny csrc/ in a copy of the project: what compiles, what is compiled again, what is refused."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import toolchain  # noqa: E402

BINDINGS = """
#include <torch/csrc/stable/library.h>
#include "kernels/answer.hpp"
int64_t answer() { return kAnswer + kernel_image_size(); }
STABLE_TORCH_LIBRARY(megamoe_build_test, m) { m.def("answer() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(megamoe_build_test, CompositeExplicitAutograd, m) { m.impl("answer", TORCH_BOX(&answer)); }
"""
HEADER = """
#pragma once
#include <cstdint>
constexpr int64_t kAnswer = 42;
int64_t kernel_image_size();
"""
KERNEL = """
#include <cuda_runtime.h>
#include <cstdint>
__global__ void add_one(float* x) { x[threadIdx.x] += 1; }
int64_t kernel_image_size() { return reinterpret_cast<void*>(&add_one) == nullptr; }
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what setup.py needs, with a csrc/ of one binding, one header and one kernel."""
    tree = tmp_path_factory.mktemp("project with a space")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("scripts", "recipes", "megamoe_train"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name, text in (("bindings.cpp", BINDINGS), ("kernels/answer.hpp", HEADER), ("kernels/answer.cu", KERNEL)):
        path = tree / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tree


def build(project: Path, prelude: str = "", **variables: str) -> subprocess.CompletedProcess:
    """`python setup.py -q build_ext --inplace`, after `prelude` has run in the same process."""
    code = f"""
import runpy, sys
sys.path.insert(0, "scripts")
import toolchain
{prelude}
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEGAMOE_", "TORCH_CUDA"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=project, env=kept | variables, capture_output=True, text=True, timeout=280)


NO_NVCC = "toolchain._nvcc_candidates = lambda: []\n"
NO_GPU = "toolchain.gpu_present = lambda: False\n"
GPU = "toolchain.gpu_present = lambda: True\n"


def test_without_nvcc_and_gpu_the_build_succeeds_and_says_so_in_one_line(project):
    answer = build(project, NO_NVCC + NO_GPU)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == ["kernels: the fused backend is absent: no nvcc"]
    assert not (project / "megamoe_train" / "_C.so").exists()


@pytest.mark.parametrize(
    ("prelude", "variables", "message"),
    [
        (NO_NVCC + GPU, {}, "cannot build the fused backend: no nvcc"),
        (NO_NVCC + NO_GPU, {"MEGAMOE_FORCE_CUDA_BUILD": "1"}, "cannot build the fused backend: no nvcc"),
        (NO_GPU, {"TORCH_CUDA_ARCH_LIST": "8.0"}, "TORCH_CUDA_ARCH_LIST asks for 8.0"),
        (NO_GPU, {"MEGAMOE_FORCE_CUDA_BUILD": "1", "MEGAMOE_SKIP_CUDA_BUILD": "1"}, "both set"),
    ],
)
def test_what_cannot_be_built_but_must_be_is_one_line(project, prelude, variables, message):
    answer = build(project, prelude, **variables)
    assert answer.returncode == 1
    assert message in answer.stderr and len(answer.stderr.splitlines()) == 1


def test_skip_wins_over_a_gpu_and_says_so(project):
    answer = build(project, GPU, MEGAMOE_SKIP_CUDA_BUILD="1")
    assert answer.returncode == 0 and answer.stdout.strip() == "kernels: not built: MEGAMOE_SKIP_CUDA_BUILD is set"


@pytest.fixture(scope="module")
def nvcc():
    try:
        return toolchain.find_nvcc()[0]
    except toolchain.ToolchainError as error:
        pytest.skip(f"{error}: MEGAMOE_FORCE_CUDA_BUILD=1 make test fetches one")


def test_build_load_and_build_again(project, nvcc):
    """One build, then: it loads without a GPU, links no driver, and only what changed is compiled again."""
    first = build(project, MEGAMOE_FORCE_CUDA_BUILD="1", MAX_JOBS="2")
    assert first.returncode == 0, first.stdout + first.stderr
    assert compiled(first) == {"csrc/bindings.cpp", "csrc/kernels/answer.cu"} and "2 at a time" in first.stdout
    assert answer_of(project) == 42
    needed = subprocess.run(["readelf", "-d", project / "megamoe_train/_C.so"], capture_output=True, text=True).stdout
    assert "libtorch_cpu.so" in needed and not re.search(r"NEEDED.*libcud|NEEDED.*python", needed)
    assert "sm_90a" in (project / "build/kernels/csrc/kernels/answer.cu.o.log").read_text()

    assert compiled(build(project)) == set()
    header = project / "csrc/kernels/answer.hpp"
    header.write_text(header.read_text().replace("42", "43"))
    assert compiled(build(project)) == {"csrc/bindings.cpp"}
    assert answer_of(project) == 43


def test_broken_code_fails_with_the_compilers_words(project, nvcc):
    kernel = project / "csrc/kernels/answer.cu"
    for line, words in (
        ("int broken(", "expected"),
        ("#include <cuda.h>\nint driver() { return cuInit(0); }", "undefined reference to `cuInit'"),
    ):
        kernel.write_text(KERNEL + line)
        answer = build(project)
        assert answer.returncode == 1 and "the build failed" in answer.stderr, answer.stdout
        assert words in answer.stdout


def compiled(answer: subprocess.CompletedProcess) -> set[str]:
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return set(re.findall(r"\] compile (\S+)", answer.stdout))


def answer_of(project: Path) -> int:
    code = "import torch; torch.ops.load_library('megamoe_train/_C.so'); print(torch.ops.megamoe_build_test.answer())"
    answer = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return int(answer.stdout)
