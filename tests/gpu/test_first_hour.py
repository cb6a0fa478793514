"""`examples/first_gpu_hour.sh` with tiny sizes, on the device with and without Transformer Engine."""

import json
import os
import subprocess
import sys

import pytest

from tests.emulation import start
from tests.gpu import device
from tests.gpu.inputs import ROOT

LOCAL_PARTS = [
    "correctness (tests/gpu, local)",
    *(f"stage {stage}, local, {layer}" for stage in "12" for layer in ("MoE-LPR", "Megatron's MoE layer")),
]
ENGINE_PARTS = ["correctness (tests/gpu, local)", "stage 1, transformer_engine, MoE-LPR"]


@pytest.mark.skipif(not device.EMULATED, reason="would start itself: it runs these tests")
@pytest.mark.parametrize(
    ("with_engine", "only", "names"),
    [(False, (), LOCAL_PARTS), (True, ("correctness", "1, transformer_engine, MoE-LPR"), ENGINE_PARTS)],
    ids=["without engine", "with engine"],
)
def test_every_part_passes(with_engine, only, names, tmp_path):
    output = tmp_path / "figures.json"
    environment = os.environ | {"PYTHON": sys.executable} | start.environment(with_engine)
    command = ["bash", "examples/first_gpu_hour.sh", "--quick", "--output", output]
    command += ["--only", *only] if only else []
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "EMULATED: shows that the program runs, no speed" in done.stdout.replace("\n", " ")
    parts = json.loads(output.read_text())["parts"]
    assert [part["part"] for part in parts] == names and all(part["status"] == "passed" for part in parts)
    for part in parts[1:]:
        # Random weights: about the logarithm of the 512 words.
        assert 5.5 < part["loss"] < 8.0 and part["tokens_per_second"] is None
