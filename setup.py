"""Package metadata. Build system, linter and test settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megatron_moe_lpr" / "__init__.py").read_text()).group(1)

setup(
    name="megatron-moe-lpr",
    version=VERSION,
    description="MoE-LPR on Megatron-Core: teach a dense language model new languages without losing the old ones",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    entry_points={"console_scripts": ["moe-lpr = megatron_moe_lpr.cli:main"]},
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_moe_lpr", "megatron_moe_lpr.*"]),
    package_data={
        "megatron_moe_lpr.conversion.hugging_face": ["*.md"],
        "megatron_moe_lpr.data": ["language_codes.tsv"],
        "megatron_moe_lpr.evaluation.report": ["*.html", "*.css"],
    },
    install_requires=[
        "torch>=2.6",
        # pip takes 0.16 for Python 3.10 and 3.11: later ones need 3.12 (megatron_moe_lpr/megatron/versions.py).
        "megatron-core>=0.16.1,<0.20",
        "huggingface_hub",
        "jinja2",
        "markupsafe",
        "numpy",
        "packaging",
        # Reads SentencePiece models.
        "protobuf",
        # Megatron's asynchronous checkpoint writer hangs for ever where psutil is missing.
        "psutil",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors>=0.4",
        "sentencepiece",
        "tokenizers",
        "transformers>=4.51",
        "typing_extensions",
        # `import megatron.core` needs it from 0.18 on without saying so, and a CPU build of torch does not bring it.
        'triton; python_version >= "3.12" and platform_system == "Linux"',
        "tyro>=0.9",
        "xxhash>=3.0",
        "zstandard",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.9"],
        "eval": ["lm-eval[hf]>=0.4.10"],
        "gguf": ["gguf"],
        "logging": ["tensorboard", "wandb"],
        "test": [
            "gguf",
            "hypothesis",
            "mypy",
            "peft",
            "pytest",
            "pytest-random-order",
            "pytest-xdist",
            "ruff",
            "tensorboard",
        ],
    },
)
