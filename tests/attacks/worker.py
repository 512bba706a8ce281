"""A warmed process that runs compressions in forked children, each with a fault armed: `python worker.py FOLDER`.

One JSON object a line on standard input: keyword arguments of `compress` under "job", and under "fault" what faults_arm
takes; or "kill_after", seconds until SIGKILL. One a line on standard output: how the child ended. Started with the
library of faults.c preloaded. One thread: a child cannot use its parent's.
"""

import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from typing import Any

import torch

from streamprune.errors import StreampruneError
from streamprune.pipeline import scheduler
from streamprune.pipeline.compress import compress

ACTIONS = {"count": 0, "kill": 1, "full": 2, "stop": 3}
KINDS = {"write": 1, "sync": 2, "rename": 4, "remove": 8, "create": 16, "mode": 32}


def arm(out: str, action: str = "count", at: int = -1, kinds: tuple[str, ...] = (), error: int = 28) -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    which = sum(KINDS[kind] for kind in kinds or KINDS)
    library.faults_arm(ctypes.c_char_p(out.encode()), ACTIONS[action], ctypes.c_long(at), which, error)
    library.faults_counted.restype = ctypes.c_long
    return library


def run(order: dict[str, Any]) -> dict[str, Any]:
    """In the child: compress, and say how it went."""
    pruned: list[int] = []
    original = scheduler.prune_block

    def noted(skeleton: Any, index: int, *rest: Any) -> Any:
        pruned.append(index)
        return original(skeleton, index, *rest)

    scheduler.prune_block = noted
    library = arm(order["job"]["out"], **order.get("fault", {}))
    ended: dict[str, Any] = {}
    try:
        ended["status"] = compress(**order["job"]).status
    except StreampruneError as error:
        ended = {"status": "refused", "exit_code": error.exit_code, "message": str(error)}
    except BaseException:
        ended = {"status": "broken", "message": traceback.format_exc()}
    return {**ended, "pruned": pruned, "operations": library.faults_counted()}


def forked(order: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.close(reading)
        os.write(writing, json.dumps(run(order)).encode())
        os._exit(0)
    os.close(writing)
    started, said = time.monotonic(), b""
    with os.fdopen(reading, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], order.get("kill_after"))
        if not ready:
            os.kill(child, signal.SIGKILL)
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    ended = json.loads(said) if said else {"status": "killed"}
    return {
        **ended,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(forked(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
