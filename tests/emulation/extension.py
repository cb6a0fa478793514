"""The module `transformer_engine_torch`, made of the emulated functions: Transformer Engine's Python part runs on it.

Tests only. Install it before anything of Megatron is imported; nothing of it is reachable from the package.
"""

import importlib
import os
import sys
import types
import warnings
from importlib import metadata
from typing import Any

# Each of these files adds its functions to FUNCTIONS.
from tests.emulation import (  # noqa: F401
    attention,
    attention_backend,
    fused_attention,
    norms,
    optimizer,
    packed,
    permutation,
    products,
    router,
    router_losses,
)
from tests.emulation.kernels import FUNCTIONS, KernelRefuses, without_a_fit
from tests.emulation.names import EXTENSION
from tests.emulation.table import ENUMERATIONS, TABLE, VERSIONS

CUDNN_VERSION, CUBLAS_VERSION, CUBLAS_STREAMS = 91500, 130000, 4


class Absent:
    """A name that the emulation lacks: may be named, passed on and subclassed, never called."""

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
        words = [_short(value) for value in args] + [f"{name}={_short(value)}" for name, value in kwargs.items()]
        raise KernelRefuses(f"{self.name}({', '.join(words)}) is a CUDA kernel that is not emulated")


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}{tuple(shape)}" if shape is not None else repr(value)[:40]


class Extension(types.ModuleType):
    """The emulated `transformer_engine_torch`: the names of this version's extension and no others."""


def is_available() -> bool:
    """Whether Transformer Engine's Python part is installed, and only that."""
    return _installed("transformer-engine") and not _installed("transformer-engine-torch")


def is_installed() -> bool:
    """Whether this process runs on the emulation."""
    return isinstance(sys.modules.get(EXTENSION), Extension)


def version() -> str:
    """Version of Transformer Engine's Python part."""
    return metadata.version("transformer-engine")


def install(with_kernels: bool = True) -> None:
    """Make `import transformer_engine.pytorch` give modules that compute.

    Args:
        with_kernels: without them modules construct and autograd functions run up to the first kernel, which raises.
    """
    if is_installed():
        return
    _check_version()
    # Without it the first import looks for cuDNN, NVRTC and cuRAND and raises RuntimeError.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    module = Extension(EXTENSION)
    contents = {name: Absent(f"{EXTENSION}.{name}") for name in TABLE.names} | ENUMERATIONS
    contents |= FUNCTIONS if with_kernels else {}
    contents["get_cudnn_version"] = lambda: CUDNN_VERSION
    contents["get_cublasLt_version"] = lambda: CUBLAS_VERSION
    contents["get_num_cublas_streams"] = lambda: CUBLAS_STREAMS
    vars(module).update(contents, __all__=sorted(contents))
    sys.modules[EXTENSION] = module
    with warnings.catch_warnings():
        # The package tries to load the extension and warns that there is none.
        warnings.simplefilter("ignore")
        common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
    if with_kernels:
        permutation.install()


def _check_version() -> None:
    if version() not in VERSIONS:
        raise RuntimeError(
            f"the emulation has no table of Transformer Engine {version()}'s extension, only of {', '.join(VERSIONS)}; "
            "write it with tests/emulation/write_table.py"
        )
    if without_a_fit():
        raise RuntimeError(f"Transformer Engine {version()} has other arguments for {', '.join(without_a_fit())}")


def block() -> None:
    """Make Megatron find no Transformer Engine in this process, as on a machine without it."""
    sys.modules["transformer_engine"] = None


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
