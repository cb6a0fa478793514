# shellcheck shell=bash disable=SC2154  # what run.sh sets
# The images that the Dockerfile starts from, in buildah's storage. Sourced by run.sh.

PYTHON_BASE=$(sed -n 's/^FROM \(.*\) AS cpu$/\1/p' Dockerfile)
PYTORCH_RELEASE=${PYTORCH_RELEASE:-$(sed -n 's/^ARG PYTORCH_RELEASE=//p' Dockerfile)}
GPU_BASE=$(sed -n 's/^FROM \(.*\) AS gpu$/\1/p' Dockerfile)
GPU_BASE=${GPU_BASE/\$\{PYTORCH_RELEASE\}/$PYTORCH_RELEASE}
# What the stand-in of the GPU base is made of: megatron-core has left Python 3.11 behind with 0.17.
GPU_PYTHON_BASE=$PYTHON_BASE
if [ "$PYTORCH_RELEASE" != 25.11 ]; then GPU_PYTHON_BASE=python:3.13-slim-trixie; fi
VERSIONS='import numpy, torch; print("torch", torch.__version__, "numpy", numpy.__version__)'

# The real one if it can be pulled.
cpu_base() { python_base "$PYTHON_BASE"; }

python_base() {
    local image=$1 reason="as asked"
    if [ -z "${STAND_IN:-}" ]; then
        if buildah pull "$image" >"$work/log" 2>&1; then
            echo "$image" | tee "$work/base"
            return
        fi
        reason="it could not be pulled ($(tail -n 1 "$work/log"))"
    fi
    echo "== STAND-IN base, not the image of that name: $image out of Debian's packages; $reason"
    echo "a stand-in" >"$work/base"
    debian_with_python "$image"
}

# A Debian with its own Python where the image of that name has one: in /usr/local, with pip.
debian_with_python() {
    local image=$1 context=$work/context sources=()
    local version=${image#*:} suite=${image##*-}
    version=python${version%%-*}
    require mmdebstrap
    mkdir "$context"
    debian_sources "$suite" >"$work/sources.list"
    if [ -s "$work/sources.list" ]; then sources=("$work/sources.list"); fi
    mmdebstrap --quiet --variant=minbase --include="ca-certificates,netbase,tzdata,$version,$version-venv" \
        "$suite" "$context/root.tar" "${sources[@]}"
    build "docker.io/library/$image" --file - "$context" <<DOCKERFILE
FROM scratch
ADD root.tar /
RUN $version -m venv /usr/local
CMD ["python3"]
DOCKERFILE
    rm -r "$context"
}

# debian_sources SUITE: this machine's, or none where it is of another distribution: then mmdebstrap has its own.
debian_sources() {
    apt-get indextargets --format "deb \$(REPO_URI) \$(RELEASE) \$(COMPONENT)" 'Created-By: Packages' |
        grep -E "/debian(-security)?/? $1(-updates|-security)? main$" || true
}

# The pinned torch, without CUDA, and what else the RUN lines find on the other base: make, git, and constraints that
# contradict setup.py, as the real one's may.
gpu_base() {
    [ -n "$(buildah images --quiet "$GPU_PYTHON_BASE" 2>/dev/null)" ] || python_base "$GPU_PYTHON_BASE"
    echo "== STAND-IN base, not the image of that name: $GPU_BASE out of $GPU_PYTHON_BASE, with the pinned torch, without CUDA"
    echo "a stand-in" >"$work/base"
    build "$GPU_BASE" --file - . <<DOCKERFILE
FROM $GPU_PYTHON_BASE
RUN apt-get update && apt-get install --yes --no-install-recommends git make gcc libc6-dev binutils \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt tests/next/torch.sh tests/next/stand_ins.py /tmp/
RUN bash /tmp/torch.sh python /tmp/constraints.txt && pip install --no-cache-dir --constraint /tmp/constraints.txt torch numpy
RUN mkdir /etc/pip && echo "transformers==4.0.0" >/etc/pip/constraint.txt
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt
RUN python -c '$VERSIONS' >/versions
DOCKERFILE
}
