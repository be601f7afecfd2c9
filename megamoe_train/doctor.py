"""`python -m megamoe_train.doctor [--json]`: what is installed here, and which backend would run and why.

Standard library only, every probe guarded: it prints on a machine where torch does not import. What may crash or hang
(loading the extension, importing TransformerEngine) runs in a process of its own. Exits 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path

from . import config, extension, versions

CHILD_TIMEOUT_S = 120.0
KERNEL_ARCH = (9, 0)  # Hopper: what the extension is built for

Section = dict  # of str to object; bare, so that an old Python gets as far as hearing that it is too old


def probe_versions() -> Section:
    """This package and the packages whose versions matter, each with its verdict."""
    found: Section = {"megamoe_train": f"{versions.__version__} in {extension.PACKAGE}"}
    for name in versions.TESTED:
        found[name] = versions.version_state(name).describe().split(" ", 1)[1]
    found["executable"] = sys.executable
    found["platform"] = f"{platform.platform()}, {os.cpu_count()} cores"
    return found


def probe_driver() -> Section:
    """The GPUs the driver shows, asked without torch."""
    listed = _output(["nvidia-smi", "-L"])
    if not listed:
        return {"nvidia-smi": "not found, or shows no GPU"}
    version = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"])
    return {"version": version or "unknown", "shows": listed.splitlines()}


def probe_torch() -> Section:
    """What this torch was built with and what it sees."""
    import torch
    import torch.distributed as dist

    return {
        "built for CUDA": torch.version.cuda or "no (CPU build)",
        "CUDA available": torch.cuda.is_available(),
        "process groups": ", ".join(name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available")()),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "not asked (no GPU)",
    }


def probe_gpus() -> Section:
    """The GPUs torch can use, and whether they reach each other."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        if "shows" in probe_driver():
            return {"usable": "none, though the driver shows some: torch does not fit the driver, or they are hidden"}
        return {"usable": "none: this machine runs the reference backend over gloo"}
    found: Section = {}
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        fits = "" if (gpu.major, gpu.minor) == KERNEL_ARCH else ", not the sm_90 that the kernels are built for"
        size = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} SMs"
        found[f"GPU {index}"] = f"{gpu.name}, {size}, sm_{gpu.major}{gpu.minor}{fits}"
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    if pairs:
        blocked = [f"{a} -> {b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
        found["peer access"] = f"missing: {', '.join(blocked)}" if blocked else "every GPU reaches every other"
    return found


def probe_fabric() -> Section:
    """What lies between the GPUs: NVIDIA's matrix of links, symmetric memory, and measured pull bandwidth."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return {"fabric": "none: no GPU"}
    if count == 1:
        return {"fabric": "none: one GPU, which has no peer"}
    found: Section = {}
    matrix = _output(["nvidia-smi", "topo", "-m"])
    rows = [line.rstrip() for line in (matrix or "").splitlines() if re.match(r"\W*(\[4m)?\s*GPU\d", line)]
    found["links (nvidia-smi topo -m)"] = rows or "not told"
    command = [sys.executable, "-m", "megamoe_train.fabric"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {**found, "measured": f"nothing after {CHILD_TIMEOUT_S:.0f} s: the fabric hangs"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        return {**found, "measured": f"failed: {said[-1] if said else f'exit status {done.returncode}'}"}
    return found | json.loads(lines[-1])


def probe_extension() -> Section:
    """The compiled CUDA extension: there, loadable, newer than its sources; else why not."""
    files = extension.built_files()
    if not files:
        return {"state": extension.fused_missing(), "nvcc": _nvcc()}
    found: Section = {}
    for file in files:
        built = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(file.stat().st_mtime))
        found[file.name] = f"{file.stat().st_size / 2**20:.1f} MiB, built {built}"
        found[f"{file.name} loads"] = _load_apart(file)
        newer = _sources_newer_than(file)
        if newer:
            found[f"{file.name} is stale"] = f"{', '.join(newer[:3])} changed since; install again"
    return {**found, "nvcc": _nvcc()}


def probe_megatron() -> Section:
    """Megatron: where it lies, whether its two halves are there."""
    found: Section = {}
    for name in ("megatron.core", "megatron.training"):
        spec = _spec(name)
        found[name] = "not found" if spec is None else str(Path(spec.origin or "").parent)
    parent = _spec("megatron")
    places = list(parent.submodule_search_locations or []) if parent else []
    if len(places) > 1:
        found["more than one megatron"] = f"{places}: the first that holds a module wins"
    return found


def probe_transformer_engine() -> Section:
    """TransformerEngine: Megatron uses it for grouped experts, MLA and FP8 where it is there."""
    if _spec("transformer_engine") is None:
        return {"state": "not installed: Megatron uses SequentialMLP experts and unfused attention"}
    names = ("transformer_engine", "transformer_engine_torch", "transformer_engine_cu13", "transformer_engine_cu12")
    found: Section = {name: version for name in names if (version := versions.installed_version(name))}
    found["imports"] = _run_apart("import transformer_engine.pytorch")
    return found


def probe_apex() -> Section:
    """NVIDIA's apex is not on PyPI; PyPI's `apex` is another project under the same name. Told apart by contents."""
    spec = _spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return {
            "state": "not installed (with TransformerEngine, Megatron needs it for gradient accumulation fusion only)"
        }
    folder = Path(next(iter(spec.submodule_search_locations)))
    version = versions.installed_version("apex") or "unknown version"
    if (folder / "multi_tensor_apply").is_dir() or (folder / "optimizers").is_dir():
        return {"state": f"NVIDIA's apex {version} in {folder}"}
    other = f"{folder} holds another project of that name ({version}), not NVIDIA's apex"
    return {"state": f"{other}: `pip uninstall apex`; Megatron takes it for NVIDIA's"}


def probe_environment() -> Section:
    """MEGAMOE_* variables that are set, and the others that steer a build or a run."""
    others = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")
    found: Section = {name: os.environ[name] for name in others if name in os.environ}
    for name in sorted(name for name in os.environ if name.startswith("MEGAMOE_")):
        known = "" if name in config.ENVIRONMENT else " (unknown: nothing reads it)"
        found[name] = os.environ[name] + known
    return found or {"variables": "none set"}


def probe_backend() -> Section:
    """What each setting of `backend` means for this machine's tensors, and a small layer run on what "auto" takes."""
    import torch

    from . import backends

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: Section = {"device": device}
    for setting in config.BACKENDS:
        choice = backends.choose(setting, device)
        found[setting] = f"{choice.name or 'unavailable'}: {choice.why}"
    chosen = backends.choose("auto", device).name
    found["self-test"] = _self_test(device, chosen) if chosen else 'not run: backend="auto" is unavailable'
    return found


PROBES: dict[str, Callable[[], Section]] = {
    "versions": probe_versions,
    "driver": probe_driver,
    "torch": probe_torch,
    "GPUs": probe_gpus,
    "fabric": probe_fabric,
    "extension": probe_extension,
    "Megatron": probe_megatron,
    "TransformerEngine": probe_transformer_engine,
    "apex": probe_apex,
    "environment": probe_environment,
    "backend": probe_backend,
}


def examine() -> dict[str, Section]:
    """Every section; a probe that fails reports its error in its own section."""
    report = {}
    for name, probe in PROBES.items():
        try:
            report[name] = probe()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a broken package may even raise SystemExit on import
            report[name] = {"probe failed": f"{type(error).__name__}: {error}"}
    return report


def _self_test(device: str, backend: str) -> str:
    """One layer, forward and backward, against dense torch and its autograd."""
    import torch

    from .functional import moe

    started = time.monotonic()
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 256), (2, 256, 256), (2, 256, 128))
    x, fc1, fc2 = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    x, fc1, fc2 = x.bfloat16(), (fc1 / 16).bfloat16(), (fc2 / 11).bfloat16()
    ids = torch.tensor([[0, 1]], device=device).expand(64, 2)
    p = torch.rand(64, 2, generator=generator).to(device)
    ours, dense = (fc1.clone().requires_grad_() for _ in range(2))
    y = moe(x, ids, p, ours, fc2, backend=backend)
    expected = 0
    for e in range(2):
        gate, up = (x.float() @ dense[e].float().t()).chunk(2, -1)
        expected = expected + (torch.nn.functional.silu(gate) * up * p[:, e, None]) @ fc2[e].float().t()
    y.float().sum().backward()
    expected.sum().backward()
    errors = [((a - b).norm() / b.norm()).item() for a, b in ((y.float(), expected), (ours.grad, dense.grad))]
    verdict = "passed" if max(errors) < 0.02 else "FAILED"
    figures = f"relative error y {errors[0]:.1e}, dfc1 {errors[1]:.1e}, {time.monotonic() - started:.2f} s"
    return f"{verdict} on {backend} ({device}, bf16): {figures}"


def _spec(name: str):
    """Where a module would be imported from, without importing it; None where there is none."""
    try:
        return util.find_spec(name)
    except ModuleNotFoundError:  # its parent is missing
        return None


def _load_apart(file: Path) -> str:
    # What torch.ops.load_library does, without its own message in place of the linker's.
    return _run_apart(f"import ctypes, torch; ctypes.CDLL({str(file)!r})")


def _run_apart(code: str) -> str:
    """ "yes", or the last line of what went wrong, from a Python process of its own."""
    try:
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=CHILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no: nothing after {CHILD_TIMEOUT_S:.0f} s"
    if child.returncode == 0:
        return "yes"
    lines = child.stderr.strip().splitlines()
    return f"no: {lines[-1] if lines else f'exit status {child.returncode}'}"


def _sources_newer_than(file: Path) -> list[str]:
    """Sources of a checkout that changed after the extension was built; nothing in an installed wheel."""
    root = extension.PACKAGE.parent
    built = file.stat().st_mtime
    sources = [path for path in (root / "csrc").rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(root)) for path in sources if path.stat().st_mtime > built)


def _nvcc() -> str:
    """Which nvcc a build would find and its release."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if found is None:
        packaged = versions.installed_version("nvidia-cuda-nvcc")
        return f"in the package nvidia-cuda-nvcc {packaged}" if packaged else "not found"
    release = re.search(r"release ([\d.]+)", _output([found, "--version"]) or "")
    return f"{found}, release {release.group(1) if release else 'unknown'}"


def _output(command: list[str]) -> str | None:
    """What a command prints; None where it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _text(report: dict[str, Section]) -> str:
    lines = []
    for name, section in report.items():
        lines.append(name)
        for key, value in section.items():
            parts = value if isinstance(value, list) else [value]
            lines += [f"  {key}: {part}" for part in parts]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megamoe_train.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    as_json = parser.parse_args(argv).json
    report = examine()
    print(json.dumps(report, indent=2, default=str) if as_json else _text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
