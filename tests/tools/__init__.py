"""Tests of tools/ and commands/."""
