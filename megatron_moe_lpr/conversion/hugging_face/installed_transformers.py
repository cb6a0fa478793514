"""What the installed version of transformers lacks: models came with its versions, and version 5 changed mixtures."""

from collections.abc import Mapping
from typing import Any

from megatron_moe_lpr.errors import UserError

NEWEST = 5
"""The major version that reads `rope_parameters`, and that holds all experts of a layer in one tensor each way."""


def check_model_type(config: Mapping[str, Any], place: str) -> None:
    """Check that the installed transformers has a class for a configuration, and reads its rotary embedding.

    Args:
        place: file that holds the configuration, for messages.

    Raises:
        UserError: it has no class for the `model_type`, or ignores `rope_parameters` without an error.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    version, model_type = _version(), config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{place}: the installed transformers {version} has no class for {model_type!r}; "
            "pip install --upgrade transformers"
        )
    if "rope_parameters" in config and "rope_theta" not in config and _is_earlier(version):
        raise UserError(
            f"{place}: names its rotary embedding in rope_parameters, which the installed transformers {version} "
            f"ignores; {_remedy()}"
        )


def check_mixtures(place: str) -> None:
    """Check that transformers holds the experts of a layer in one tensor each way.

    Args:
        place: flag that needs it, for the message.

    Raises:
        UserError: an earlier version is installed.
    """
    if _is_earlier(_version()):
        raise UserError(f"{place}: needs the mixtures of transformers {NEWEST}, {_version()} is installed; {_remedy()}")


def _version() -> str:
    import transformers

    return transformers.__version__


def _is_earlier(version: str) -> bool:
    return int(version.split(".")[0]) < NEWEST


def _remedy() -> str:
    return f"pip install 'transformers>={NEWEST}'"
