"""`examples/first_gpu_hour.sh` as a user starts it, with tiny sizes, on the device without Transformer Engine."""

import json
import os
import subprocess
import sys

import pytest

from tests.emulation import start
from tests.gpu import device
from tests.gpu.inputs import ROOT


@pytest.mark.skipif(not device.EMULATED, reason="would start itself: it runs these tests")
def test_every_part_passes(tmp_path):
    output = tmp_path / "figures.json"
    environment = os.environ | {"PYTHON": sys.executable} | start.environment(with_engine=False)
    command = ["bash", "examples/first_gpu_hour.sh", "--quick", "--output", output]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "EMULATED: shows that the program runs, no speed" in done.stdout.replace("\n", " ")
    recorded = json.loads(output.read_text())
    parts = recorded["parts"]
    assert len(parts) == 5 and all(part["status"] == "passed" for part in parts)
    for part in parts[1:]:
        # Random weights: about the logarithm of the 512 words.
        assert 5.5 < part["loss"] < 8.0 and part["tokens_per_second"] is None
