"""Puts the emulated extension in place before any conftest imports Megatron.

python -m pytest -p tests.emulation.plugin tests/emulation tests/gpu tests/transformer_engine
"""

import os

# In a process that starts on the emulated device this import puts the emulation in place (boot/sitecustomize.py).
# Otherwise the extension's own first import would, which would find the extension half made.
import megatron_moe_lpr  # noqa: F401
from tests.emulation import extension, start

if extension.is_available() and not os.environ.get(start.WITHOUT_ENGINE):
    extension.install()
