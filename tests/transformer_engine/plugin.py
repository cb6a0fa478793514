"""Puts the stand-in in place before any conftest imports Megatron.

python -m pytest -p tests.transformer_engine.plugin tests/transformer_engine
"""

from tests.transformer_engine import stub

if stub.is_available():
    stub.install()
