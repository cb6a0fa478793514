"""torchrun's agent, for runs whose nodes come and go: a request to stop ends the run, the loss of a node does not.

torchrun's own agent (torch/distributed/elastic/agent/server/api.py `_invoke_run`) restarts the workers after every exit
code but 0, also after that of workers that have saved because they were asked to stop.
"""

import os
from collections.abc import Callable, Sequence

import torch.distributed.launcher.api as launcher
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from megatron_moe_lpr.training.signals import EXIT_REQUEUE, StopRequest

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable of torch: 1 gives the workers a new store with each rendezvous."""


class Agent(LocalElasticAgent):
    """Starts the workers of this node, and decides after a failure whether they start again. One for each process."""

    stop: StopRequest
    """Whether this launcher was asked to stop."""
    node_code: Callable[[Sequence[int], bool], int]
    """Returns the exit code of a node from the codes of its workers and whether its launcher was asked to stop."""
    last_code = 0
    """Exit code of this node after the latest failure of its workers; 75: they have saved because they were asked."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state in (WorkerState.UNHEALTHY, WorkerState.FAILED):
            asked = self.stop.received is not None
            codes = [failure.exitcode for failure in result.failures.values()]
            Agent.last_code = Agent.node_code(codes, asked) if codes else 1
            self._count(asked, worker_group.group_world_size or 1)
        return result

    def _count(self, asked: bool, nodes: int) -> None:
        """Set how many restarts are left, from which torchrun then takes the one after this failure."""
        saved = self.last_code == EXIT_REQUEUE
        if asked or (saved and nodes == 1):
            self._remaining_restarts = 0
        elif saved and self._remaining_restarts > 0:
            # The launcher of another node is gone, or was asked to stop and now closes the rendezvous.
            self._remaining_restarts += 1


def install(stop: StopRequest, node_code: Callable[[Sequence[int], bool], int], several_nodes: bool) -> type[Agent]:
    """Make torchrun use `Agent`, and with several nodes a new store for the workers with each rendezvous.

    With torch's default, one store for all rendezvous, nodes that were there before read the addresses of ranks that
    have ended, and a node that joins waits for a key that nobody writes again (torch/distributed/elastic/rendezvous/
    dynamic_rendezvous.py `next_rendezvous`).

    Args:
        stop: the launcher's own.
        node_code: see `Agent.node_code`.

    Returns:
        The class, whose `last_code` tells how the workers ended.
    """
    if several_nodes:
        os.environ.setdefault(OWN_STORE, "1")
    Agent.stop, Agent.node_code, Agent.last_code = stop, staticmethod(node_code), 0
    launcher.LocalElasticAgent = Agent  # type: ignore[misc]
    return Agent
