"""Fixtures: the cluster, and inputs that its jobs share."""

import os

import pytest

from tests.launching.builders import ROOT, prepare_inputs
from tests.slurm.cluster import Cluster, missing_programs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A running two-node cluster."""
    if missing := missing_programs():
        pytest.skip(f"SLURM is not installed (no {', '.join(missing)}); apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as their users, so the test cluster needs root")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """Directory with a converted tiny model and datasets."""
    return prepare_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def submit(cluster, inputs, tmp_path):
    """Return a function that submits with CPU settings and returns the command's output, such as the job's number."""

    def run(*command: str, **settings: object) -> str:
        from tests.launching.builders import environment

        own = environment(inputs, LOAD=inputs / "moe", **settings)
        cluster_settings = {name: cluster.environment[name] for name in ("SLURM_CONF", "PATH")}
        return cluster.run(*command, environment={**own, **cluster_settings}, cwd=ROOT)

    return run
