"""Builds csrc/ into megamoe_train/_C.so: a shared library on torch's stable ABI, loaded by torch.ops.load_library.

It knows no Python ABI and links no CUDA driver (entry points come from cudaGetDriverEntryPoint, cudart is static), so
one build loads under any Python and also where there is no GPU. ninja runs the compilers: in parallel (MAX_JOBS), and
only what changed. Variables: docs/configuration.md. The metadata is in pyproject.toml.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))
import toolchain  # noqa: E402

CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "kernels"  # kept between builds, also those pip starts
SOURCES = sorted(path.relative_to(ROOT) for suffix in ("cu", "cpp") for path in CSRC.rglob(f"*.{suffix}"))

NINJA_RULES = """
rule compile
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)
  description = compile $name
  depfile = $out.d
  deps = gcc
rule link
  command = $nvcc -shared $in -o $out $ldflags
  description = link _C.so
"""


def compile_flags(torch: Path) -> list[str]:
    major, minor = (int(part) for part in toolchain.TESTED["torch"].split("."))
    return [
        "-std=c++20",
        "-O3",
        "-gencode=arch=compute_90a,code=sm_90a",
        "--expt-relaxed-constexpr",
        "-lineinfo",
        "-Xptxas=-v",  # registers and spills of each kernel: build/kernels/**/*.log
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
        *(f"-D{name}" for name in ("MEGAMOE_RANDOM_DELAYS", "MEGAMOE_TRACE") if toolchain.env_flag(name)),
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        f"-I{CSRC}",
        f"-isystem={torch / 'include'}",
        f"-isystem={torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
    ]


def link_flags(tools: toolchain.Toolchain) -> list[str]:
    # The PyPI packages keep libcudart_static.a in lib/, where their own nvcc does not look.
    beside_nvcc = Path(tools.nvcc).resolve().parent.parent / "lib"
    # -z defs: a symbol nobody defines (a direct driver call, say) fails here and not at the first import.
    return [
        "-cudart=static",
        *([f"-L{beside_nvcc}"] if (beside_nvcc / "libcudart_static.a").exists() else []),
        f"-L{tools.torch / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        "-Xlinker=-z,defs",
    ]


def ninja_file(tools: toolchain.Toolchain) -> str:
    def command(*words: str) -> str:
        return shlex.join(words).replace("$", "$$")

    def path(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    variables = {"nvcc": [tools.nvcc], "flags": compile_flags(tools.torch), "ldflags": link_flags(tools)}
    lines = [*(f"{name} = {command(*words)}" for name, words in variables.items()), NINJA_RULES]
    objects = [path(f"{source}.o") for source in SOURCES]
    for source, target in zip(SOURCES, objects, strict=True):
        lines += [f"build {target}: compile {path(ROOT / source)}", f"  name = {source}"]
    lines += [f"build _C.so: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def compiler_remarks() -> list[str]:
    """Lines of the compile logs that someone should read: warnings, and register spills with their kernel's name."""
    remarks, kernel = [], ""
    for source in SOURCES:
        for line in (BUILD / f"{source}.o.log").read_text().splitlines():
            if named := re.search(r"Compiling entry function '(\S+)'|Function properties for (\S+)", line):
                kernel = named[1] or named[2]
            elif "warning" in line.lower():
                remarks.append(f"{source}: {line.strip()}")
            elif re.search(r"[1-9]\d* bytes spill", line):
                remarks.append(f"{source}: {kernel}: {line.strip()}")
    return remarks


class BuildKernels(build_ext):
    """Decides whether kernels are built here, then has ninja build them."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # the stable ABI: no Python version in the name

    def run(self) -> None:
        try:
            self.tools = self.choose()
        except toolchain.ToolchainError as error:
            sys.exit(f"kernels: cannot build the fused backend: {error}")
        if self.tools is None:
            self.extensions = []
        super().run()

    def choose(self) -> toolchain.Toolchain | None:
        required = toolchain.kernels_required()
        if toolchain.env_flag("MEGAMOE_SKIP_CUDA_BUILD"):
            print("kernels: not built: MEGAMOE_SKIP_CUDA_BUILD is set", flush=True)
            return None
        toolchain.check_arch()
        try:
            if not SOURCES:
                raise toolchain.ToolchainError("csrc/ holds no .cu or .cpp file")
            return toolchain.find_toolchain()
        except toolchain.ToolchainError as error:
            if required:
                raise
            print(f"kernels: the fused backend is absent: {error}", flush=True)
            return None

    def build_extension(self, ext: Extension) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        (BUILD / "build.ninja").write_text(ninja_file(self.tools))
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        nvcc = f"nvcc {self.tools.nvcc_release} ({self.tools.nvcc})"
        print(f"kernels: {nvcc}, {len(SOURCES)} files, {jobs} at a time", flush=True)
        if subprocess.run([self.tools.ninja, "-C", str(BUILD), f"-j{jobs}"]).returncode:
            sys.exit("kernels: the build failed; the first error stands above")
        print(*(f"kernels: {line}\n" for line in compiler_remarks()), sep="", end="", flush=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(BUILD / "_C.so"), str(target))


setup(
    packages=[*find_packages(include=["megamoe_train", "megamoe_train.*"]), "megamoe_train.recipes"],
    package_dir={"megamoe_train.recipes": "recipes"},
    ext_modules=[Extension("megamoe_train._C", sources=[str(source) for source in SOURCES])],
    cmdclass={"build_ext": BuildKernels},
)
