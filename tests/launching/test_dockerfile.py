"""The Dockerfile, as far as it can be checked without a Docker engine."""

import re

from packaging.requirements import Requirement

from tests.launching.builders import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTALLED_BY_THEMSELVES = {"torch", "megatron-core"}


def test_every_copied_path_exists():
    copied = [path for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()]
    assert copied and all((ROOT / path).exists() for path in copied), copied


def test_images_are_pinned_and_do_not_run_as_root():
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert [stage.split()[2] for stage in stages] == ["gpu", "cpu"]
    for stage in stages:
        assert re.match(r"\S+:\d\S*", stage) and re.findall(r"^USER (.*)", stage, re.MULTILINE)[-1] == "trainer"


def test_requirements_are_those_of_the_package():
    setup = (ROOT / "setup.py").read_text()
    wanted = re.search(r"install_requires=\[(.*?)\]", setup, re.DOTALL).group(1)
    wanted = {Requirement(text) for text in re.findall(r'"(.+?)"', wanted)}
    wanted = {need for need in wanted if need.name not in INSTALLED_BY_THEMSELVES}
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    for stage in stages:
        words = {word.strip("'") for word in stage.replace("\\\n", " ").split()}
        assert {str(need) for need in wanted} <= words
