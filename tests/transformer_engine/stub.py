"""Transformer Engine's Python part without its CUDA libraries: a stand-in for the compiled extension.

Tests only, in the environment that `environment.sh` makes; nothing of it is reachable from the package. With it
Transformer Engine imports, its modules construct and its autograd functions run up to the first kernel, which raises.
"""

import enum
import importlib
import os
import sys
import types
import warnings
from importlib import metadata
from typing import Any

EXTENSION = "transformer_engine_torch"
CUDNN_VERSION = 91500


class DType(enum.IntEnum):
    """The extension's enumeration of number formats; tables of Transformer Engine are keyed by it."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class Absent:
    """Any other name of the extension: may be named, passed on and subclassed at import, never called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> "Absent":
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return Absent(f"{self.name}.{attribute}")

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Absent) and other.name == self.name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{self.name} is a CUDA kernel, and this is the stand-in without any")


class Extension(types.ModuleType):
    """The stand-in of `transformer_engine_torch`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{EXTENSION}.{name}")


def is_available() -> bool:
    """Whether Transformer Engine's Python part is installed, and only that."""
    return _installed("transformer-engine") and not _installed("transformer-engine-torch")


def version() -> str:
    """Version of the real Python part."""
    return metadata.version("transformer-engine")


def is_installed() -> bool:
    """Whether this process runs on the stand-in."""
    return isinstance(sys.modules.get(EXTENSION), Extension)


def install() -> None:
    """Make `import transformer_engine.pytorch` succeed; call it before anything of Megatron is imported."""
    if is_installed():
        return
    # Without it the first import looks for cuDNN, NVRTC and cuRAND and raises RuntimeError.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    extension = Extension(EXTENSION)
    extension.DType, extension.get_cudnn_version = DType, lambda: CUDNN_VERSION
    extension.__all__ = ["get_cudnn_version"]  # of what cpp_extensions re-exports, constructors ask only this
    sys.modules[EXTENSION] = extension
    with warnings.catch_warnings():
        # The package tries to load the extension and warns that there is none.
        warnings.simplefilter("ignore")
        common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")


def block() -> None:
    """Make Megatron find no Transformer Engine in this process, as on a machine without it."""
    sys.modules["transformer_engine"] = None


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
