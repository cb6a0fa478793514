"""Checks the launcher's flags: numbers of nodes and ranks, the node's number, and the port at which nodes meet.

With a wrong one torchrun would end in a traceback, or wait for nodes that never come.
"""

import argparse
import errno
import os
import re
import socket

from megatron_moe_lpr.errors import UserError

PORTS = 65535
DEFAULT_PORT = 29500
"""torchrun's default for --master-port."""
KINDS_OF_DEVICES = ("gpu", "cpu", "auto", "xpu")
"""Values of torchrun's --nproc-per-node besides a number."""


def check_launch(flags: argparse.Namespace) -> None:
    """Check values of torchrun's flags that its parser does not check.

    Args:
        flags: result of torchrun's parser.

    Raises:
        UserError: naming the flag.
    """
    least, nodes = node_range(flags.nnodes)
    ranks = str(flags.nproc_per_node)
    if ranks not in KINDS_OF_DEVICES and not re.fullmatch(r"[1-9]\d{0,5}", ranks):
        raise UserError(f"--nproc-per-node {ranks}: the ranks of a node, 1 or more")
    if flags.max_restarts < 0:
        raise UserError(f"--max-restarts {flags.max_restarts}: must be at least 0")
    _check_restarts(flags, least, nodes)
    if flags.standalone or flags.rdzv_backend != "static" or flags.rdzv_endpoint:
        return  # another rendezvous than --master-addr and --master-port
    if not 0 <= flags.node_rank < nodes:
        raise UserError(f"--node-rank {flags.node_rank}: the nodes of --nnodes {flags.nnodes} are 0 to {nodes - 1}")
    if flags.master_port is None and nodes == 1:
        return  # torchrun takes a free one
    port = DEFAULT_PORT if flags.master_port is None else flags.master_port
    if not 0 <= port <= PORTS:
        raise UserError(f"--master-port {port}: must be from 1 to {PORTS}")
    if port == 0 and nodes > 1:
        raise UserError("--master-port 0: takes any free port, which the other nodes would not find; give a number")
    if flags.node_rank == 0 and port:
        check_port(port, "--master-port")


def check_port(port: int, flag: str) -> None:
    """Check that this process can listen at a port of this machine.

    Args:
        flag: names the port in the message.

    Raises:
        UserError: the port is in use, or only root may use it.
    """
    dual = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        ).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"{flag} {port}: another program uses this port, perhaps another run; give another"
            ) from None
        raise UserError(f"{flag} {port}: {os.strerror(error.errno or 0)}; give another port") from None


def node_range(text: str) -> tuple[int, int]:
    """Return the fewest and the most nodes of a value of --nnodes such as `4` or `2:4`.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})(?::([1-9]\d{0,5}))?", text)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise UserError(f"--nnodes {text}: a number of nodes, 1 or more, or LEAST:MOST")
    return int(match[1]), int(match[2] or match[1])


def _check_restarts(flags: argparse.Namespace, least: int, most: int) -> None:
    """Check that several nodes that restart, or are more or fewer later, can agree on it.

    Raises:
        UserError: naming the flags of the rendezvous that can.
    """
    if most == 1 or flags.standalone:
        return
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint HOST:PORT --rdzv-id NAME, the same on all nodes"
    what = f"--nnodes {flags.nnodes}" + (f" with --max-restarts {flags.max_restarts}" if least == most else "")
    if (least < most or flags.max_restarts) and flags.rdzv_backend == "static":
        raise UserError(f"{what}: the nodes cannot meet again at --master-addr; give {rendezvous}")
    if flags.rdzv_backend != "c10d":
        return
    if not flags.rdzv_endpoint:
        raise UserError(f"--rdzv-backend c10d with {flags.nnodes} nodes: give {rendezvous}")
    if flags.rdzv_id == "none" and (least < most or flags.max_restarts):
        raise UserError(f"{what}: give this launch a name by --rdzv-id, the same on all nodes")
