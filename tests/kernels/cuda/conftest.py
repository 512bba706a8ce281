"""Figures of the compiled kernels, shown at the end of a run, whatever is captured."""

from collections import defaultdict
from collections.abc import Callable

import pytest

Figures = dict[str, dict[str, dict[int, str]]]  # by title, kernel and architecture
FIGURES = pytest.StashKey[Figures]()


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str, str, int, str], None]:
    """Keeps a figure (title, kernel, architecture, text) for the end of the run."""
    figures = request.config.stash.setdefault(FIGURES, defaultdict(lambda: defaultdict(dict)))

    def keep(title: str, kernel: str, architecture: int, text: str) -> None:
        figures[title][kernel][architecture] = text

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, kernels in sorted(config.stash.get(FIGURES, {}).items()):
        terminalreporter.section(f"CUDA kernels: {title}")
        for kernel, found in sorted(kernels.items()):
            texts = " | ".join(f"sm_{architecture} {text}" for architecture, text in sorted(found.items()))
            terminalreporter.write_line(f"{kernel:24s} {texts}")
