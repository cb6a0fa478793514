"""Tests of the newest stack: Python 3.12, megatron-core 0.19 and the newest torch, in an environment of their own."""
