"""Puts the emulated extension in place before any conftest imports Megatron.

python -m pytest -p tests.emulation.plugin tests/emulation tests/gpu tests/transformer_engine
"""

from tests.emulation import extension

if extension.is_available():
    extension.install()
