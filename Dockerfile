# MoE-LPR on Megatron-Core.
#   docker build -t moe-lpr .                     for NVIDIA GPUs: the last target, so the default one
#   docker build -t moe-lpr --build-arg PYTORCH_RELEASE=25.11 --build-arg MEGATRON_CORE=0.16.1 .   on the older base
#   docker build -t moe-lpr:cpu --target cpu .    to try it without
#   docker run IMAGE make test                    self-check
# What to install is read from setup.py. Only what pip needs for that is copied before it: a change of the code leaves
# the layer with the packages as it is.

# Release of nvcr.io/nvidia/pytorch, and the megatron-core that goes with it: 26.06 with 0.19.2, 25.11 with 0.16.1.
ARG PYTORCH_RELEASE=26.06
ARG MEGATRON_CORE=0.19.2

FROM python:3.11-slim-bookworm AS cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make shellcheck \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 trainer
WORKDIR /opt/moe-lpr
COPY setup.py pyproject.toml constraints.txt README.md ./
COPY megatron_moe_lpr/__init__.py megatron_moe_lpr/
# PyTorch's index of CPU builds makes a smaller image than the default one: --build-arg TORCH_INDEX=... It has torch,
# and not all that torch needs: that comes with the rest.
ARG TORCH_INDEX
RUN pip install --no-cache-dir --constraint constraints.txt --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && pip install --no-cache-dir --constraint constraints.txt --editable '.[test]'
COPY . .
RUN chown -R trainer .
# make uses this Python instead of an environment of its own.
ENV SYSTEM_PYTHON=1
USER trainer
CMD ["bash"]

FROM nvcr.io/nvidia/pytorch:${PYTORCH_RELEASE}-py3 AS gpu
ARG MEGATRON_CORE
RUN useradd --create-home --uid 10001 trainer
WORKDIR /opt/moe-lpr
COPY setup.py pyproject.toml README.md ./
COPY megatron_moe_lpr/__init__.py megatron_moe_lpr/
# The base's torch and Transformer Engine stay: pip fails rather than replaces what these constraints pin. Those of
# constraints.txt are of another torch, and the base's own (PIP_CONSTRAINT) are older than what setup.py asks for.
RUN pip list --format=freeze | grep -iE '^(torch|torchvision|triton|numpy|transformer[_-]engine.*)==' > /tmp/base.txt \
    && echo "megatron-core==${MEGATRON_CORE}" >> /tmp/base.txt \
    && PIP_CONSTRAINT= pip install --no-cache-dir --constraint /tmp/base.txt --editable '.[test]' \
    && rm /tmp/base.txt
COPY . .
RUN chown -R trainer .
# make uses this Python instead of an environment of its own.
ENV SYSTEM_PYTHON=1
USER trainer
CMD ["bash"]
