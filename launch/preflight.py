"""Checks that all nodes of a job respond and can communicate; node.sh runs it before each training:

    python launch/preflight.py ADDRESS PORT RANK NODE…

The nodes register with the first one, which can thus name those that don't. Then they run an all-reduce over gloo, as
the training will. If that takes longer than $TRAINER_PREFLIGHT_TIMEOUT (default 60) seconds: one message, exit code 1.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import timedelta

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # otherwise each attempt to connect is logged, with its stack
import torch
import torch.distributed as dist


def preflight(address: str, port: int, rank: int, nodes: list[str], limit_s: float) -> str | None:
    """Returns what is wrong; None if nothing is, an empty string if another node reports it."""
    limit = timedelta(seconds=limit_s)
    deadline = time.monotonic() + limit_s
    try:
        store = dist.TCPStore(address, port, is_master=rank == 0, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        if rank == 0:
            return f"node {nodes[0]} can't listen on port {port}: {error}"
        return (
            f"node {nodes[rank]} (rank {rank}): the first node, {nodes[0]}, did not respond at {address}:{port} within "
            f"{limit_s:g} s"
        )
    store.set(f"node {rank}", "here")
    if rank == 0:
        missing = [
            f"node {nodes[other]} (rank {other})"
            for other in range(1, len(nodes))
            if not _responds(store, other, deadline)
        ]
        if missing:
            return f"{', '.join(missing)} did not respond within {limit_s:g} s"
        store.set("complete", "yes")
    try:
        store.wait(["complete"], limit)
    except RuntimeError:
        return ""
    try:
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=len(nodes), timeout=limit
        )
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == len(nodes)
    except RuntimeError as error:
        interfaces = ", ".join(name for _, name in socket.if_nameindex())
        return (
            f"node {nodes[rank]} (rank {rank}) reaches the first node, but not all the others: {error}\n"
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface that the nodes share; this one "
            f"has {interfaces}"
        )
    dist.destroy_process_group()
    return None


def _responds(store: dist.TCPStore, rank: int, deadline: float) -> bool:
    try:
        store.wait([f"node {rank}"], timedelta(seconds=max(0.001, deadline - time.monotonic())))
    except RuntimeError:
        return False
    return True


def main(address: str, port: str, rank: str, *nodes: str) -> int:
    """The command line; returns the exit code."""
    started = time.monotonic()
    wrong = preflight(
        address, int(port), int(rank), list(nodes), float(os.environ.get("TRAINER_PREFLIGHT_TIMEOUT") or 60)
    )
    if wrong:
        print(f"error: {wrong}", file=sys.stderr, flush=True)
    elif wrong is None and rank == "0":
        print(f"all {len(nodes)} nodes responded ({time.monotonic() - started:.1f} s)", flush=True)
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
