# shellcheck shell=bash
# GNOME's desktop help, text of another program by other writers: Debian's or Ubuntu's package gnome-user-docs (8 MB,
# CC BY-SA 3.0), which this fetches. Needs apt-get and dpkg. Sourced after common.sh.

# gnome_text DIRECTORY LANGUAGE...: its pages as DIRECTORY/text/LANGUAGE.jsonl.
gnome_text() {
    local directory=$1 program
    shift
    for program in apt-get dpkg; do
        if ! command -v $program >/dev/null; then
            echo "error: $program is not here; the text comes from the Debian package gnome-user-docs" >&2
            exit 1
        fi
    done
    step "$directory/.unpacked" "the package gnome-user-docs" _unpack_gnome "$directory/package"
    step "$directory/text/.done" "its pages in $*" "$PYTHON" examples/demo/gnome_help.py \
        --pages "$directory/package/usr/share/help" --languages "$@" --output "$directory/text"
}

_unpack_gnome() {
    mkdir -p "$1"
    (cd "$1" && apt-get download -q gnome-user-docs && dpkg -x gnome-user-docs_*.deb .)
}
