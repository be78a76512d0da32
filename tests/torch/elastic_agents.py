"""Four agents of torchrun on loopback, each with one rank; two of them are killed, agent and worker, as a node that is gone.

What `torchrun --nnodes=1:4 --nproc-per-node=1 --rdzv-backend=c10d ...` runs; agents and workers are forked from a process that
has imported everything, instead of importing torch thirteen times.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from examples import train_torchrun

os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else gloo finds addresses of the start before in torchrun's store
LEAVE = {7: 4, 12: 3}
"""At which step the last rank's node is gone, of so many."""


def work(folder: str) -> None:
    def leave(step: int) -> None:
        gone = Path(folder) / f"gone-{step}"
        if step not in LEAVE or gone.exists():
            return
        if dist.get_world_size() != LEAVE[step]:
            signal.pause()  # an agent is late: when it has come, all are started anew
        if dist.get_rank() == LEAVE[step] - 1:
            gone.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # the agent's handlers came with the fork
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    sys.argv = ["train_torchrun", "--url", folder, "--steps", "16", "--every", "5"]
    train_torchrun.main(leave)


def agent(port: int, folder: str) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=4,
        nproc_per_node=1,
        run_id="elastic",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"is_host": False, "last_call_timeout": 1, "keep_alive_interval": 1, "join_timeout": 900},
        max_restarts=100,
        monitor_interval=0.05,
        start_method="fork",
        local_addr="127.0.0.1",
    )
    elastic_launch(config, work)(folder)


def main(folder: str) -> None:
    told, tell = os.pipe()
    agents = []
    for _ in range(4):
        if (pid := os.fork()) == 0:
            os.close(tell)
            agent(int(os.read(told, 5)), folder)
            os._exit(0)
        agents.append(pid)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a machine that stays
    os.write(tell, f"{store.port:05d}".encode() * 4)
    ended = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in agents)
    print("agents", *ended, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
