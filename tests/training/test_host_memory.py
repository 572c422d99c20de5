from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, sys
import torch
from raydist.training.host_memory import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**23) for _ in range(4)]
    activations.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
print([faults_of_a_step() for _ in range(8)][-1])
"""


def faults(mode: str) -> int:
    finished = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(finished.stdout)


def test_a_step_uses_the_memory_of_those_before():
    assert faults("keep") < 1000
    assert faults("default") > 10_000
