#!/usr/bin/env bash
# Builds both targets of the Dockerfile without a Docker engine, by buildah, and tries the images as their own users.
#
#   TARGETS=cpu bash tests/docker/run.sh        one of them
#   PYTORCH_RELEASE=25.11 MEGATRON_CORE=0.16.1 bash tests/docker/run.sh        the gpu target on the older base
#   STAND_IN=1 bash tests/docker/run.sh         not on the real python image, even where it can be pulled
#
# The gpu target is always built on a stand-in: its real base takes 20 GB, and vfs, the one storage that works
# everywhere, copies all of it for each layer. Needs root, 15 GB below TMPDIR (/var/tmp), and the programs that it names
# when they are missing. Leaves nothing behind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-python3}
TARGETS=${TARGETS:-cpu gpu}
source tests/docker/bases.sh

fail() {
    echo "error: $*" >&2
    exit 1
}

require() {
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || fail "$program is not here; on Debian: apt-get install buildah mmdebstrap"
    done
}

[ "$(id -u)" = 0 ] || fail "make test-docker needs root, for the chroots and mounts in which it builds"
require buildah

work=$(mktemp -d "${TMPDIR:-/var/tmp}/moe-lpr-docker.XXXXXX")
# What buildah keeps while it commits, too.
export TMPDIR=$work BUILDAH_ISOLATION=chroot
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM
buildah() { command buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }

mounts=()
"$PYTHON" tests/docker/pip_settings.py "$work" >"$work/mounts"
while read -r mount; do mounts+=(--volume "$mount"); done <"$work/mounts"

# build TAG ARGUMENTS...: its log on the terminal only if it fails.
build() {
    local tag=$1
    shift
    if ! buildah bud --pull=never --tag "$tag" "${mounts[@]}" "$@" >"$work/log" 2>&1; then
        tail -n 60 "$work/log"
        fail "$tag was not built"
    fi
}

# inside CONTAINER OPTIONS... -- COMMAND...: as `docker run OPTIONS --volume ...:/opt/moe-lpr/runs` would.
inside() { buildah run --volume "$work/runs:/opt/moe-lpr/runs" "$@"; }

try_cpu() {
    local container
    container=$(buildah from --pull=never moe-lpr:cpu)
    inside "$container" -- python -m pip check
    inside "$container" -- bash tests/docker/inside.sh
    [ "$(stat --format %u "$work/runs/demo/report.html")" = 10001 ] || fail "the demo's report is not the image's user's"
    echo "== as a user that the image does not know, as by docker run --user"
    chown -R 12345:12345 "$work/runs"
    inside --user 12345:12345 "$container" -- bash tests/docker/inside.sh quick
    buildah rm "$container" >/dev/null
}

try_gpu() {
    local container base kept
    container=$(buildah from --pull=never moe-lpr:gpu)
    base=$(inside "$container" -- cat /versions)
    kept=$(inside "$container" -- python -c "$VERSIONS")
    [ "$kept" = "$base" ] || fail "the base had $base, the image has $kept"
    echo "kept of the base: $kept"
    inside "$container" -- bash tests/docker/inside.sh quick
    buildah rm "$container" >/dev/null
}

summary=()
for target in $TARGETS; do
    SECONDS=0
    "${target}_base"
    based=$SECONDS
    echo "== the target $target of the Dockerfile"
    build "moe-lpr:$target" --target "$target" --build-arg "PYTORCH_RELEASE=$PYTORCH_RELEASE" ${MEGATRON_CORE:+--build-arg "MEGATRON_CORE=$MEGATRON_CORE"} .
    built=$((SECONDS - based))
    mkdir -p "$work/runs"
    chown 10001:10001 "$work/runs"
    "try_$target"
    size=$(buildah images --format '{{.Size}}' "moe-lpr:$target")
    summary+=("moe-lpr:$target, $size, on $(cat "$work/base"): base $based s, build $built s, tried in $((SECONDS - based - built)) s")
    rm -rf "$work/runs"
done
printf '== %s\n' "${summary[@]}"
