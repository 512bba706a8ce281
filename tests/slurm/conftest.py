"""A real Slurm on loopback while the tests run. Where it is not installed they are skipped; in CI that is an error."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_host import Slurm

CLUSTER = Path(__file__).with_name("cluster.sh")
NEEDED = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged")
PORT = 17810  # below the ports that Linux gives out by itself


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in NEEDED if shutil.which(name, path=path) is None]:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{', '.join(missing)} not installed; .ci/run installs Slurm")
        pytest.skip(f"{', '.join(missing)} not installed (apt-get install slurmctld slurmd slurm-client munge)")
    state = Path(tempfile.mkdtemp(prefix="slurm-"))
    state.chmod(0o755)  # munge refuses a socket that others cannot reach, as in pytest's own folders
    with pytest.MonkeyPatch.context() as patch:
        about = {"SP_DIR": str(state), "SP_PORT": str(PORT), "SLURM_CONF": f"{state}/etc/slurm.conf"}
        for name, value in {**about, "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        try:
            started = subprocess.run(["bash", str(CLUSTER), "up"], capture_output=True, text=True, timeout=120)
            assert started.returncode == 0, started.stderr
            yield Slurm(state)
        finally:
            subprocess.run(["bash", str(CLUSTER), "down", "--purge"], capture_output=True, timeout=60)
