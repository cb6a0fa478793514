"""The LoRA row: only the linear layers change, by little, and the model stays a stock dense one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe_lpr.data.preprocessing import PreprocessOptions, preprocess  # noqa: F401
