"""What is kept between allocations."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from rb_noisy import device

# How often the system had to provide a page while large tensors came and went.
FAULTS = """
import resource, torch
from rb_noisy.device import keep_freed_memory
{first}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(10, 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_tensor():
    def count(first: str) -> int:
        run = subprocess.run([sys.executable, "-c", FAULTS.format(first=first)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    assert count("keep_freed_memory()") < 10 < count("") / 5


def test_without_glibc_nothing_is_done(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(device.ctypes, "CDLL", no_library)
    device.keep_freed_memory()
