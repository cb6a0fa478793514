"""Tests of the room megatron/."""
