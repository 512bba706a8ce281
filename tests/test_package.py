"""The distributions, built as they are published: from the sources, then from the source distribution alone.

Slow, and needs a package index for setuptools; `make package` runs it.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta as backend; backend.build_{}({!r})"
pytestmark = pytest.mark.slow


def run(*command: object, folder: Path) -> str:
    """Standard output of a command that sees nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment, which finds this one's libraries, but not what is installed editable."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, folder=folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "setuptools>=77", folder=folder)
    [site] = (folder / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def unpacked(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    run(python, "-c", BUILD.format("sdist", str(folder)), folder=ROOT)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(python: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the source distribution alone makes, installed into the fresh environment."""
    folder = tmp_path_factory.mktemp("wheel")
    run(python, "-c", BUILD.format("wheel", str(folder)), folder=unpacked)
    [wheel] = folder.glob("*.whl")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel, folder=folder)
    return wheel


def test_the_source_distribution_holds_what_builds_and_tests_it(unpacked: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    missing = {name for name in listed if not (unpacked / name).exists()}
    assert missing <= {".gitignore"}


def test_the_wheel_holds_what_runs_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    modules = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in (("streamprune", ROOT / "streamprune"), ("streamprune_kernels", ROOT / "kernels"))
        for kind in ("py", "cu", "cuh", "typed", "gz", "md")
        for path in folder.rglob(f"*.{kind}")
    }
    [library] = [name for name in contents if name.startswith("streamprune_kernels/_cpu.") and name.endswith(".so")]
    assert {name for name in contents if ".dist-info/" not in name} == {*modules, library}
    assert not any(section in contents[library] for section in (b".symtab", b".debug_info"))


@pytest.mark.usefixtures("wheel")
def test_what_is_installed_works_elsewhere(
    python: Path, sources: Callable[[str], Path], calibration: Path, outputs: Callable[..., Path], tmp_path: Path
) -> None:
    """The command, a job of the bytes that the checkout makes, and the tests that the source distribution brings."""
    command = python.with_name("streamprune")
    assert "compress" in run(command, "--help", folder=tmp_path)
    where = (
        "import streamprune, streamprune_kernels as k; print(streamprune.__file__, k.__file__, k.library() is not None)"
    )
    package, kernels, compiled = run(python, "-c", where, folder=tmp_path).split()
    assert Path(package).is_relative_to(python.parents[1])
    assert Path(kernels).is_relative_to(python.parents[1])
    assert compiled == "True"
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in tiny.CALIBRATION.items()]
    job = ["compress", sources("llama"), "--out", "out", "--calibration", calibration, *settings, "--quiet"]
    assert run(command, *job, folder=tmp_path).startswith("finished: out, 3 blocks\n")
    assert tiny.digests(tmp_path / "out") == tiny.digests(outputs("llama"))
    assert run(command, "verify", "out", "--source", sources("llama"), folder=tmp_path).endswith("ok\n")


@pytest.mark.usefixtures("wheel")
def test_the_source_distribution_tests_itself(python: Path, unpacked: Path) -> None:
    tests = ["tests/test_public_names.py", "tests/kernels/test_kernels_packing.py", "tests/runtime/test_export.py"]
    assert " passed" in run(python, "-m", "pytest", "-q", *tests, folder=unpacked)
