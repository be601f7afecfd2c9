"""What a job asks of its machine: a driver that torch can use, GPUs that nobody else holds, room for the workspace."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from pathlib import Path

import pytest
import torch

from megamoe_train import memory, placement, pretrain, recipes
from megamoe_train.shapes import Layout, ModelShape
from megamoe_train.training import job, machine, request, settings


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Puts an nvidia-smi on PATH that shows two GPUs under a driver of this version."""

    def show(version: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f'#!/bin/sh\nprintf "{version}, NVIDIA H100 80GB HBM3\\n{version}, NVIDIA H100 80GB HBM3\\n"\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return show


@pytest.mark.parametrize(
    ("version", "cuda", "message"),
    [
        (
            "535.104.05",
            "13.0",
            r"driver: 535\.104\.05 is too old for torch built for CUDA 13\.0, which needs 580 or new",
        ),
        ("470.82", "12.8", "which needs 525 or newer .2 x NVIDIA H100"),
        ("590.10", "13.0", "shows 2 x NVIDIA H100 80GB HBM3, but torch .CUDA 13.0. can use none"),
        ("590.10", None, "but this torch is built without CUDA"),
    ],
)
def test_gpus_that_torch_cannot_use_are_an_error_and_not_a_slow_run(driver, version, cuda, message):
    driver(version)
    with pytest.raises(ValueError, match=message):
        machine.check_driver(0, cuda)


def test_no_complaint_where_there_is_nothing_to_complain_of(driver, monkeypatch, tmp_path):
    driver("535.104.05")
    machine.check_driver(2, "13.0")  # torch uses them
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        machine.check_driver(0, "13.0")  # the user wants the CPU
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    machine.check_driver(0, "13.0")  # no driver that answers


def test_two_jobs_do_not_share_a_gpu(tmp_path):
    held = machine.claim_gpu("GPU-1/2", tmp_path)
    other = machine.claim_gpu("GPU-3", tmp_path)
    with pytest.raises(ValueError, match=rf"GPU GPU-1/2: another job is training on it \(process {os.getpid()}\)"):
        machine.claim_gpu("GPU-1/2", tmp_path)
    os.close(held)
    again = machine.claim_gpu("GPU-1/2", tmp_path)
    os.close(again)
    os.close(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megamoe-gpu-GPU-12.lock", "megamoe-gpu-GPU-3.lock"]
    assert all(path.stat().st_mode & 0o777 == 0o666 for path in tmp_path.iterdir())


def test_a_workspace_larger_than_free_memory_is_refused():
    recipe = recipes.find("deepseek_v4_flash_proxy_2gpu_h100_bf16", recipes.World(2, 2, True))
    table = settings.from_recipe(recipe.settings)
    model = ModelShape.of(table)
    needed = memory.workspace(model, Layout.of(table, 2, model))
    machine.check_workspace(table, 2, free=needed, total=80 << 30)
    with pytest.raises(
        ValueError, match=r"workspace: 0\.50 GiB for 8192 tokens a rank, top-6, hidden 4096; free on thi"
    ):
        machine.check_workspace(table, 2, free=needed - 1, total=80 << 30)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["tokenizer-model=absent/tokenizer.json"], "tokenizer-model: absent/tokenizer.json does not exist"),
        (["vocab-file=absent.json"], "vocab-file: absent.json does not exist"),
    ],
)
def test_a_tokenizer_that_is_not_there(sets, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        request.check_early(request.Request("debug", Path("out"), sets=tuple(sets)), 2, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    """This process is the only rank of a job, on a machine that torch counts `gpus` GPUs on, with 1 MiB free."""
    before = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    locks = tmp_path / "locks"
    locks.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(locks))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 80 << 30))
    monkeypatch.setattr(placement.Place, "mine", classmethod(lambda cls, device: cls("here", gpu="GPU-1")))
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def run(gpus: int) -> int:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return job.run(request.Request("debug", tmp_path / "out"), verbose=True)

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("case", "gpus", "message"),
    [
        ("taken", 1, "rank 0: GPU GPU-1: another job is training on it (process "),
        ("full", 1, "rank 0: workspace: 0.0"),
        ("old", 0, "driver: 470.82 is too old for torch built for CUDA 13.0, which needs 580 or newer"),
    ],
)
def test_a_rank_that_torchrun_started_refuses_in_one_line(case, gpus, message, one_rank, driver, capfd, tmp_path):
    driver("470.82")
    held = machine.claim_gpu("GPU-1") if case == "taken" else None
    assert one_rank(gpus) == job.USER_ERROR
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith(f"megamoe_train: error: {message}")
    assert not (tmp_path / "out").exists()
    if held:
        os.close(held)


def test_the_command_refuses_an_old_driver_before_it_starts_ranks(driver, capsys, monkeypatch, tmp_path):
    driver("470.82")
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(pretrain.launch, "start", lambda *_: pytest.fail("ranks were started"))
    assert pretrain.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("megamoe_train: error: driver: 470.82 is too old for torch")
    assert not (tmp_path / "out").exists()
