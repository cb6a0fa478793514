"""The programs that an export is written for. Imports no torch, so that --help is fast."""

from typing import Literal

Engine = Literal["transformers", "llama.cpp"]
