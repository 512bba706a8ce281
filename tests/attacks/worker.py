"""A warmed process that runs jobs in forked children: `python worker.py`.

One JSON object a line on standard input, one a line on standard output: how the child ended. An order holds either
keyword arguments of `compress` under "job", and under "fault" what faults_arm takes (the library of faults.c is then
preloaded); or arguments of the command line under "command", or, to be run in this process and not in a child, under
"warm". "kill_after" are seconds until SIGKILL. One thread: a child cannot use its parent's.
"""

import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from streamprune.cli import cli
from streamprune.errors import StreampruneError
from streamprune.model.skeleton import Block
from streamprune.pipeline import two_passes
from streamprune.pipeline.compress import compress

ACTIONS = {"count": 0, "kill": 1, "full": 2, "stop": 3}
MAX_PRINTED = 1 << 20
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
    original = two_passes.prune_block

    def noted(block: Block, *rest: Any) -> Any:
        pruned.append(block.index)
        return original(block, *rest)

    two_passes.prune_block = noted
    library = arm(order["job"]["out"], **order.get("fault", {}))
    ended: dict[str, Any] = {}
    try:
        ended["status"] = compress(**order["job"]).status
    except StreampruneError as error:
        ended = {"status": "refused", "exit_code": error.exit_code, "message": str(error)}
    except BaseException:
        ended = {"status": "broken", "message": traceback.format_exc()}
    return {**ended, "pruned": pruned, "operations": library.faults_counted()}


def command(arguments: list[str]) -> int:
    """Run the command line as `python -m streamprune` does, tracebacks of what it does not catch included."""
    try:
        cli(arguments, prog_name="streamprune")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def commanded(order: dict[str, Any]) -> dict[str, Any]:
    """In the child: the command's exit code, what it printed, and its peak memory above what the imports take.

    It starts with a copy of those. Pages of files, such as libraries, come on demand and do not count.
    """
    printed = {number: os.memfd_create(str(number)) for number in (1, 2)}
    for number, file in printed.items():
        os.dup2(file, number)
    Path("/proc/self/clear_refs").write_text("5")  # a child inherits the peak of its parent
    resident, of_files = memory_bytes("VmRSS"), memory_bytes("RssFile")
    code = command(order["command"])
    above = memory_bytes("VmHWM") - resident - (memory_bytes("RssFile") - of_files)
    sys.stdout.flush()
    sys.stderr.flush()
    texts = {}
    for number, file in printed.items():
        texts[number] = os.pread(file, MAX_PRINTED, 0).decode(errors="backslashreplace")
    return {"exit_code": code, "stdout": texts[1], "stderr": texts[2], "memory_bytes": above}


def memory_bytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) * 1024


def warmed(order: dict[str, Any]) -> dict[str, Any]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return {"exit_code": command(order["warm"])}


def forked(order: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.close(reading)
        ended = commanded(order) if "command" in order else run(order)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(ended).encode())
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
        order = json.loads(line)
        print(json.dumps(warmed(order) if "warm" in order else forked(order)), flush=True)


if __name__ == "__main__":
    main()
