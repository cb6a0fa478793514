# MoE-LPR on Megatron-Core.
#   docker build -t moe-lpr .                     for NVIDIA GPUs
#   docker build -t moe-lpr:cpu --target cpu .    to try it without
#   docker run IMAGE make test                    self-check
# The GPU image keeps the base's torch and Transformer Engine: megatron-core comes without its dependencies, and a
# constraints file pins what the base has, so that pip fails rather than replaces.

FROM nvcr.io/nvidia/pytorch:25.11-py3 AS gpu
RUN useradd --create-home --uid 10001 trainer
WORKDIR /opt/moe-lpr
RUN pip list --format=freeze | grep -iE '^(torch|torchvision|triton|numpy|transformer[_-]engine.*)==' > /tmp/base.txt \
    && PIP_CONSTRAINT= pip install --no-cache-dir --no-deps 'megatron-core>=0.16.1,<0.17' \
    && PIP_CONSTRAINT= pip install --no-cache-dir --constraint /tmp/base.txt \
        huggingface_hub numpy packaging psutil rich 'safetensors>=0.4' sentencepiece tensorboard tokenizers \
        'transformers>=4.51' 'tyro>=0.9' 'xxhash>=3.0' zstandard hypothesis mypy pytest ruff
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . && chown -R trainer . && rm /tmp/base.txt
# make uses this Python instead of an environment of its own.
ENV SYSTEM_PYTHON=1
USER trainer
CMD ["bash"]

FROM python:3.11-slim-bookworm AS cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make shellcheck \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 trainer
WORKDIR /opt/moe-lpr
# PyTorch's index of CPU builds makes a smaller image than the default one: --build-arg TORCH_INDEX=...
ARG TORCH_INDEX
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} 'torch>=2.6' \
    && pip install --no-cache-dir --no-deps 'megatron-core>=0.16.1,<0.17' \
    && pip install --no-cache-dir \
        huggingface_hub numpy packaging psutil rich 'safetensors>=0.4' sentencepiece tensorboard tokenizers \
        'transformers>=4.51' 'tyro>=0.9' 'xxhash>=3.0' zstandard hypothesis mypy pytest ruff 'setuptools>=77'
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . && chown -R trainer .
# make uses this Python instead of an environment of its own.
ENV SYSTEM_PYTHON=1
USER trainer
CMD ["bash"]
