"""Machine code of a cubin as text, by cuobjdump and nvdisasm of the packages so named, and what a loop consists of."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cuda_tools.nvrtc import package_file

FUNCTION = re.compile(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", re.DOTALL)
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"BRA(?:\.\S+)*\s+(?:\S+,\s*)*`?\(?0x([0-9a-f]+)")
GUARD = re.compile(r"^@!?U?P\w+\s+")


@dataclass(frozen=True)
class Machine:
    """One instruction: its address in the kernel, and its text without the guard."""

    address: int
    text: str

    @property
    def name(self) -> str:
        """First part of the opcode; HMMA.SP, which multiplies by a 2:4 matrix, is not HMMA."""
        opcode = self.text.split()[0]
        return "HMMA.SP" if opcode.startswith("HMMA.SP") else opcode.split(".")[0]


def disassemble(cubin: bytes) -> dict[str, list[Machine]]:
    """Instructions of each kernel. Raises CalledProcessError where cuobjdump fails."""
    tool = package_file("nvidia-cuda-cuobjdump", "cuobjdump")
    folders = f"{package_file('nvidia-cuda-nvdisasm', 'nvdisasm').parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        dumped = subprocess.run(
            [tool, "--dump-sass", file.name],
            env={**os.environ, "PATH": folders},
            capture_output=True,
            text=True,
            check=True,
        )
    return {
        name: [Machine(int(at, 16), GUARD.sub("", text)) for at, text in INSTRUCTION.findall(body)]
        for name, body in FUNCTION.findall(dumped.stdout)
    }


def main_loop(instructions: list[Machine]) -> list[Machine]:
    """The loop body with the most matrix products, of several the shortest; empty where no loop has one."""
    best: list[Machine] = []
    for branch in instructions:
        match = BRANCH.search(branch.text)
        if match and int(match[1], 16) < branch.address:
            body = [one for one in instructions if int(match[1], 16) <= one.address <= branch.address]
            if products(body) and (not best or (products(body), -len(body)) > (products(best), -len(best))):
                best = body
    return best


def products(instructions: list[Machine]) -> int:
    return sum(one.name.startswith("HMMA") for one in instructions)


def mix(instructions: list[Machine]) -> Counter[str]:
    """How often each kind of instruction occurs."""
    return Counter(one.name for one in instructions)
