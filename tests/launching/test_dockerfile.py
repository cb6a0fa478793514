"""The Dockerfile, as far as it can be checked without a Docker engine."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from tests.launching.builders import ROOT

WRITTEN = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
RELEASE = re.search(r"^ARG PYTORCH_RELEASE=(\S+)$", WRITTEN, re.MULTILINE).group(1)
DOCKERFILE = WRITTEN.replace("${PYTORCH_RELEASE}", RELEASE)
"""As Docker reads it where no release is given."""
STAGES = dict(zip(("cpu", "gpu"), re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:], strict=True))
BASE_PACKAGES = r"grep -iE '(\S+)' > /tmp/base.txt"


def copied(stage: str) -> list[str]:
    """What a stage copies, in order, up to everything at once."""
    sources = [line.split()[1:-1] for line in re.findall(r"^COPY .*", STAGES[stage], re.MULTILINE)]
    assert sources.pop() == ["."]
    return [path for paths in sources for path in paths]


def installs(stage: str) -> list[list[str]]:
    """Arguments of each `pip install`, without those that only Docker fills in."""
    commands = re.findall(r"pip install (.*?)(?=&&|$)", STAGES[stage], re.MULTILINE)
    return [shlex.split(re.sub(r"\$\{.*?\}", "", command)) for command in commands]


def test_images_are_pinned_and_do_not_run_as_root():
    for name, stage in STAGES.items():
        assert stage.split()[2] == name
        assert re.match(r"\S+:\d\S*", stage) and re.findall(r"^USER (.*)", stage, re.MULTILINE)[-1] == "trainer"


def test_without_a_target_it_is_the_image_for_gpus():
    """As its first lines and docs/launching.md say; an engine builds the last one."""
    assert "docker build -t moe-lpr .  " in DOCKERFILE and list(STAGES)[-1] == "gpu"


def test_what_git_ignores_is_not_copied():
    """Environments, caches and runs of the checkout that an image is built from."""
    ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    named = {line for line in ignored if not line.startswith(".venv")}
    assert named <= left_out and {".git", ".venv*"} <= left_out and len(named) > 5


@pytest.mark.parametrize("stage", STAGES)
def test_what_to_install_is_read_from_setup_py(stage):
    """No requirement is repeated: torch alone may be named, without a version, to take it from an index of its own."""
    *first, last = installs(stage)
    assert last[-2:] == ["--editable", ".[test]"] and "--no-deps" not in last
    assert all(command[-2:] == ["--no-deps", "torch"] for command in first) and len(first) == (stage == "cpu")


@pytest.mark.parametrize("stage", STAGES)
def test_a_change_of_the_code_leaves_the_layer_of_the_packages(stage):
    """The layer is made of few files, none of them code, before all is copied."""
    before, after = STAGES[stage].split("COPY . .")
    assert "pip install" in before and "pip install" not in after
    assert all((ROOT / path).is_file() for path in copied(stage))
    assert {path for path in copied(stage) if path.endswith(".py")} == {"setup.py", "megatron_moe_lpr/__init__.py"}


def unconditional_requirements(requires: str) -> list[Requirement]:
    """Requirements of a requires.txt that belong to no extra: sections that begin with a colon have a marker."""
    found, marker = [], ""
    for line in filter(None, requires.splitlines()):
        if line.startswith("["):
            marker = line.strip("[]")
        elif not marker or marker.startswith(":"):
            found.append(Requirement(f"{line}; {marker[1:]}" if marker else line))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_these_files_are_all_that_setup_py_reads(stage, tmp_path):
    for path in copied(stage):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    subprocess.run([sys.executable, "setup.py", "--quiet", "egg_info"], cwd=tmp_path, check=True, timeout=120)
    found = (tmp_path / "megatron_moe_lpr.egg-info/requires.txt").read_text()
    wanted = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(), re.DOTALL).group(1)
    wanted = {str(Requirement(text)) for text in re.findall(r"^ +[\"'](.+)[\"'],$", wanted, re.MULTILINE)}
    assert {str(need) for need in unconditional_requirements(found)} == wanted and "[test]" in found


def test_the_cpu_image_has_the_versions_that_ci_tests():
    assert "constraints.txt" in copied("cpu")
    assert all(command[1:3] == ["--constraint", "constraints.txt"] for command in installs("cpu"))


def test_each_release_of_the_base_has_a_megatron_core_that_setup_py_allows():
    """The comment names the pairs; the first is the default."""
    wanted = Requirement(re.search(r'"(megatron-core[^"]*)"', (ROOT / "setup.py").read_text()).group(1))
    pairs = re.findall(r"(\d+\.\d+) with (\d+\.\d+\.\d+)", WRITTEN.split("ARG PYTORCH_RELEASE")[0])
    assert [release for release, _ in pairs] == ["26.06", "25.11"]
    assert all(wanted.specifier.contains(version) for _, version in pairs)
    assert f"ARG PYTORCH_RELEASE={pairs[0][0]}\nARG MEGATRON_CORE={pairs[0][1]}\n" in WRITTEN.split("\nFROM ")[0]
    # Declared before all stages, for FROM, and once more in the stage that uses it.
    assert re.search(r"^ARG MEGATRON_CORE$", STAGES["gpu"], re.MULTILINE)


def test_the_gpu_image_keeps_the_base_s_torch_and_transformer_engine():
    """Pinned to what the base has, under none of its other constraints."""
    (command,) = installs("gpu")
    assert command[1:3] == ["--constraint", "/tmp/base.txt"]
    assert 'echo "megatron-core==${MEGATRON_CORE}" >> /tmp/base.txt' in STAGES["gpu"]
    assert "PIP_CONSTRAINT= pip install" in STAGES["gpu"]
    pattern = re.compile(re.search(BASE_PACKAGES, STAGES["gpu"]).group(1), re.IGNORECASE)
    installed = ("torch==2.10.0a0+b558c986e8.nv25.11", "numpy==1.26.4", "triton==3.5.0", "torchvision==0.25.0a0+1")
    engines = (
        "transformer_engine==2.9.0+70f53666",
        "transformer-engine-torch==2.9.0",
        "transformer_engine_cu13==2.9.0",
    )
    assert all(pattern.match(line) for line in (*installed, *engines))
    assert not any(pattern.match(line) for line in ("torchmetrics==1.8", "transformers==4.57", "megatron-core==0.14"))
