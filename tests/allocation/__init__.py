"""Tests of how many experts each layer gets."""
