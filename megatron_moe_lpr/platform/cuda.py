"""What the CUDA platform needs beside PyTorch."""

import importlib.util

from megatron_moe_lpr.errors import UserError

INSTALL_HINT = "use the project's Docker image, or pip install 'megatron-moe-lpr[gpu]'"


def require_transformer_engine() -> None:
    """Check that Transformer Engine imports and that `apex`, where present, is NVIDIA's.

    Raises:
        UserError: naming what is missing or in the way.
    """
    _refuse_foreign_apex()
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError) as error:  # a wheel without its libraries raises RuntimeError
        raise UserError(f"Transformer Engine does not import ({error}); {INSTALL_HINT}") from error


def _refuse_foreign_apex() -> None:
    """Any package named `apex` makes Megatron choose NVIDIA's kernels; PyPI's is an unrelated web library."""
    if importlib.util.find_spec("apex") and not importlib.util.find_spec("apex.normalization"):
        raise UserError("the installed package 'apex' is not NVIDIA's; run: pip uninstall apex")
