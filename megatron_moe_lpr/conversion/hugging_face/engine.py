"""What reads an export, as flags name it. Imports nothing: flags are told before torch has been imported."""

from typing import Literal

Engine = Literal["transformers", "llama.cpp"]
