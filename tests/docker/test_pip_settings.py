"""What of pip's settings goes into an image, and what is mounted for it."""

import configparser
import os
import subprocess
import sys

from tests.docker.pip_settings import OUTSIDE, moved, settings


def test_the_environment_goes_before_files_and_only_sources_are_taken():
    listed = "\n".join(
        [
            "global.index-url='https://a.example/simple'",
            "install.index-url='https://b.example/simple'",
            "global.require-virtualenv='true'",
            "global.constraint='/etc/constraints.txt'",
            "download.cert='/never'",
            ":env:.find-links='/x=y'",
        ]
    )
    assert settings(listed) == {"index-url": "https://b.example/simple", "find-links": "/x=y"}


def test_paths_of_this_machine_are_mounted_and_addresses_are_left(tmp_path):
    wheels, index, certificate = tmp_path / "wheels", tmp_path / "mirror/simple", tmp_path / "ca.pem"
    wheels.mkdir()
    index.mkdir(parents=True)
    certificate.touch()
    given = {
        "find-links": f"{wheels} https://c.example/w",
        "extra-index-url": f"file://{index} https://c.example/simple",
        "cert": str(certificate),
        "index-url": f"file://{tmp_path}/missing",
    }
    options, mounts = moved(given)
    assert mounts == {wheels, index.parent, certificate}
    assert options["find-links"] == f"{OUTSIDE}{wheels}\nhttps://c.example/w"
    assert options["extra-index-url"] == f"file://{OUTSIDE}{index}\nhttps://c.example/simple"
    assert options["cert"] == f"{OUTSIDE}{certificate}" and options["index-url"] == given["index-url"]


def test_the_written_file_is_read_by_pip(tmp_path):
    environment = os.environ | {"PIP_FIND_LINKS": f"{tmp_path} https://c.example/w"}
    command = [sys.executable, "tests/docker/pip_settings.py", str(tmp_path)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split("\n")
    assert f"{tmp_path / 'pip.conf'}:/etc/pip.conf:ro" in printed and f"{tmp_path}:{OUTSIDE}{tmp_path}:ro" in printed
    parser = configparser.RawConfigParser()
    parser.read(tmp_path / "pip.conf")
    assert parser["global"]["find-links"].split() == [f"{OUTSIDE}{tmp_path}", "https://c.example/w"]
