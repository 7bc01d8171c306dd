"""The place of a process among the others, and the hardware it finds."""

from __future__ import annotations

import platform

import torch

from axolotl.distributed.world import World, detect_hardware, keep_freed_memory, peak_memory_bytes, world


def test_a_process_alone_is_the_main_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert world() == World(0, 1, 0)
    assert world().is_main


def test_the_launcher_tells_the_place(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world() == World(5, 8, 1)
    assert not world().is_main


def test_the_hardware_is_that_of_this_machine():
    found = detect_hardware()
    assert found.cpus >= 1
    assert (found.device == "cuda") == torch.cuda.is_available()
    assert (
        len(found.gpu_names)
        == len(found.gpu_memory_bytes)
        == (torch.cuda.device_count() if found.device == "cuda" else 0)
    )


def test_gpus_are_described(monkeypatch):
    class Properties:
        name, total_memory, major = "NVIDIA H200", 141 << 30, 9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: not including_emulation
    )
    found = detect_hardware()
    assert (found.device, found.bf16, found.tf32) == ("cuda", True, True)
    assert found.gpu_names == ("NVIDIA H200",) * 2
    assert found.gpu_memory_bytes == (141 << 30,) * 2


def test_peak_memory_grows():
    before = peak_memory_bytes()
    block = bytearray(60 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_bytes() >= before > 10 << 20


def test_freed_memory_is_kept_where_the_platform_can(monkeypatch):
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr("sys.platform", "darwin")
    assert not keep_freed_memory()
