"""The layering: cli -> pipeline, runtime (by public names) -> text, pruning -> model -> checkpoint -> kernels."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"streamprune": ROOT / "streamprune", "streamprune_kernels": ROOT / "kernels"}

EVERYWHERE = {"errors", "config", "stopping"}
MAY_IMPORT = {
    "streamprune": {
        "cluster",
        "pipeline",
        "runtime",
        "model",
        "integrations",
    },  # the public names, imported on first use
    "__main__": {"cli"},
    "cli": {"streamprune", "cluster", "summaries", "endings", "environment", "options", "process"},
    "endings": {"summaries"},
    "summaries": set(),
    "cluster": {"pipeline", "text", "checkpoint"},
    "pipeline": {"text", "model", "pruning", "checkpoint", "process", "streamprune_kernels"},
    "runtime": {"integrations", "text", "model", "pruning", "checkpoint", "process", "streamprune_kernels"},
    "integrations": {"model", "checkpoint", "streamprune_kernels"},
    "text": {"model", "checkpoint"},
    "model": {"checkpoint", "streamprune_kernels"},
    "pruning": {"streamprune_kernels"},
    "checkpoint": {"streamprune_kernels"},
    "data": set(),
    "options": set(),
    "process": set(),
    "environment": set(),
    "stopping": set(),
    "config": set(),
    "errors": set(),
    "streamprune_kernels": set(),
}
OUTSIDE = {  # what a room may import beside the standard library; None: anything
    "errors": set(),
    "config": set(),
    "streamprune_kernels": {"torch", "cupy", "numpy"},
    "pruning": {"torch", "numpy", "scipy"},
    "checkpoint": {"torch", "safetensors", "numpy", "xxhash", "msgspec"},
}
FILES_AND_PROCESSES = {"os", "io", "pathlib", "shutil", "tempfile", "json", "pickle", "subprocess", "socket", "mmap"}


def imported(source: str) -> set[str]:
    """Dotted names of the modules that a source imports, anywhere in it; `from a import b` gives a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(dotted: str) -> str:
    """streamprune.checkpoint.reader.open_file -> checkpoint; streamprune alone -> streamprune."""
    first, _, rest = dotted.partition(".")
    if first != "streamprune":
        return first
    second = rest.partition(".")[0]
    return second if second in MAY_IMPORT else "streamprune"


def modules() -> list[tuple[str, str, str]]:
    """Module path, room and source of every Python file of the package and of kernels/."""
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder).with_suffix("")
            dotted = ".".join([package, *(part for part in relative.parts if part != "__init__")])
            found.append((dotted, room_of(dotted), path.read_text(encoding="utf-8")))
    return found


def test_the_walk_finds_the_rooms_and_reads_imports_as_they_are() -> None:
    rooms = {room for _, room, _ in modules()}
    assert rooms >= set(MAY_IMPORT) - {"data"}
    assert len(modules()) >= 25
    source = "import a.b as c\ndef f():\n    from streamprune.cli import main\nif x:\n    import streamprune"
    assert imported(source) == {"a.b", "streamprune.cli.main", "streamprune"}
    assert [
        room_of(name) for name in ("streamprune", "streamprune.cli.main", "streamprune_kernels.expand", "torch.nn")
    ] == [
        "streamprune",
        "cli",
        "streamprune_kernels",
        "torch",
    ]


@pytest.mark.parametrize("module", [name for name, _, _ in modules()])
def test_module_imports_only_rooms_below_its_own(module: str) -> None:
    room, source = next((room, source) for name, room, source in modules() if name == module)
    allowed = MAY_IMPORT[room] | {room} | (EVERYWHERE if room != "streamprune_kernels" else set())
    used = {room_of(name) for name in imported(source) if name.partition(".")[0] in FOLDERS}
    if room not in ("streamprune", "cli"):
        assert "streamprune" not in used, "the package's public names are for its users and its command line"
    assert used <= allowed, f"{module} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("room", OUTSIDE)
def test_lower_rooms_stand_on_few_libraries(room: str) -> None:
    sources = [source for _, one, source in modules() if one == room]
    used = {name.partition(".")[0] for source in sources for name in imported(source)}
    foreign = used - set(sys.stdlib_module_names) - set(FOLDERS)
    assert foreign <= OUTSIDE[room]


def test_pruning_touches_no_files() -> None:
    for module, room, source in modules():
        if room == "pruning":
            assert not {name.partition(".")[0] for name in imported(source)} & FILES_AND_PROCESSES, module


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_kernels_import_and_compute_without_cupy() -> None:
    code = """
import sys
import tomllib
sys.modules["cupy"] = None
import torch, streamprune_kernels as k
y = k.nm_linear(torch.ones(1, 4), torch.tensor([[2.0, 3.0]]), torch.tensor([[0b1010]], dtype=torch.uint8))
print(y.item(), "streamprune" in sys.modules, "transformers" in sys.modules)
"""
    assert run_python(code) == "5.0 False False"


def test_help_and_the_package_wait_for_no_library() -> None:
    """`streamprune --help` imports click alone, of what is not the standard library's or ours."""
    code = """
import sys
import tomllib
from click.testing import CliRunner
import streamprune, streamprune.cli
streamprune.__version__, dir(streamprune), streamprune.PruneConfig()
for arguments in (["--help"], ["compress", "--help"], ["--version"]):
    assert CliRunner().invoke(streamprune.cli.cli, arguments).exit_code == 0
heavy = "accelerate datasets huggingface_hub matplotlib numpy pyarrow scipy torch tqdm transformers xxhash"
print(sorted(set(heavy.split()) & set(sys.modules)))
"""
    assert run_python(code) == "[]"


WHEN_USED = {
    "accelerate",
    "cupy",
    "datasets",
    "huggingface_hub",
    "lm_eval",
    "matplotlib",
    "pyarrow",
    "scipy",
    "sentencepiece",
}


def test_what_few_jobs_need_is_imported_when_it_is_used() -> None:
    for module, _, source in modules():
        of_module = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        top = {name.partition(".")[0] for node in of_module for name in imported(ast.unparse(node))}
        assert not top & WHEN_USED, module


def test_what_is_imported_is_declared_with_the_lowest_version_that_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = dict(requirement.split(">=") for requirement in project["dependencies"])
    used = {name.partition(".")[0] for _, _, source in modules() for name in imported(source)}
    foreign = used - set(sys.stdlib_module_names) - set(FOLDERS)
    assert foreign - {"cupy", "lm_eval", "vllm"} <= declared.keys()  # extras, and what brings us in
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for name, bound in declared.items():
        if name == "torch":  # see Makefile
            continue
        assert lowest[name] in (bound, f"{bound}.0", f"{bound}.0.0"), name
