"""A program that starts ranks on this machine: python -m opensora_fast.rank_launcher NPROC [-m MODULE | FILE] ARGUMENTS

torchrun's own agent does it, with `--standalone --nproc-per-node NPROC`; what differs is the end. The exit code is that
of the rank that failed first, and the ranks' own messages stand alone, without the agent's report below them; only a
rank that was killed, and could say nothing, gets a line.
"""

from __future__ import annotations

import logging
import signal
import sys
import uuid

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def main(argv: list[str]) -> int:
    """Returns 0 when all ranks did; 128 + the signal for one that ended this program or a rank."""
    nproc, *program = argv
    logging.disable(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(nproc),
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*program)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        print(f"error: rank {rank} was ended by {name}; the other ranks were ended with it", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
