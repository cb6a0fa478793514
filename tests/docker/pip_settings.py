"""Where this machine's pip gets packages from, for a pip inside an image.

    python tests/docker/pip_settings.py DIRECTORY

writes DIRECTORY/pip.conf and prints what to mount, SOURCE:TARGET:ro, one a line: that file, and what it names on this
machine's disk.
"""

import ast
import configparser
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

OUTSIDE = "/mnt/outside"
# Not its constraints: an image has its own.
SOURCES = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "cert", "client-cert")
PATIENCE = ("timeout", "default-timeout", "retries")


def settings(listed: str) -> dict[str, str]:
    """By option, of what `pip config list` prints: the environment goes before files, of a command's only install's."""
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        name, value = line.split("=", 1)
        section, option = name.rsplit(".", 1)
        if section in found and option in SOURCES + PATIENCE:
            found[section][option] = ast.literal_eval(value)
    return found["global"] | found["install"] | found[":env:"]


def on_disk(option: str, word: str) -> Path | None:
    """What has to be mounted for this word of a setting, if anything."""
    address = urlsplit(word)
    path = Path(unquote(address.path))
    if address.scheme not in ("", "file") or not path.is_absolute() or not path.exists():
        return None
    # Pages of an index may link to files that lie beside it.
    return path.parent if option.endswith("index-url") and path.parent != path.parent.parent else path


def moved(settings: dict[str, str]) -> tuple[dict[str, str], set[Path]]:
    """The settings with their paths below OUTSIDE, and what has to be mounted there."""
    result, mounts = {}, set()
    for option, value in settings.items():
        words = value.split()
        for index, word in enumerate(words):
            if source := on_disk(option, word):
                mounts.add(source)
                words[index] = f"file://{OUTSIDE}{urlsplit(word).path}" if "://" in word else OUTSIDE + word
        result[option] = "\n".join(words)
    return result, mounts


def main(directory: Path) -> None:
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True)
    options, mounts = moved(settings(listed.stdout))
    parser = configparser.RawConfigParser()
    parser["global"] = options
    with (directory / "pip.conf").open("w") as file:
        parser.write(file)
    print(f"{directory / 'pip.conf'}:/etc/pip.conf:ro")
    for source in sorted(mounts):
        print(f"{source}:{OUTSIDE}{source}:ro")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
