"""Draw the picture in README.md from figures of docs/benchmarks.md.

    python examples/overview_picture.py [docs/overview.png]

Needs matplotlib. Left: perplexity of SmolLM2-135M at 2:4 (log entry "perplexity of every method", three seeds). Right:
peak memory of `compress` by number of blocks (log entry "many bfloat16 tokens by strips of rows"), beside what the
model's weights alone would take in float32.
"""

import argparse
from pathlib import Path

PERPLEXITY = {
    "Wanda": 201.13,
    "SparseGPT\n(changes weights)": 101.59,
    "streamprune": 86.97,
    "streamprune --reconstruct\n(changes weights)": 69.70,
}
DENSE_PERPLEXITY = 26.42
PEAK_MB = {6: 852.1, 12: 854.2, 24: 853.1, 48: 855.8}
HIDDEN, INTERMEDIATE, VOCABULARY = 768, 3072, 32000  # LLaMA-160M's shape


def weights_mb(blocks: int) -> float:
    """Megabytes of all weights in float32: embeddings, head, and the linear layers of the blocks."""
    return 4 * (2 * VOCABULARY * HIDDEN + blocks * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)) / 1e6


def draw(path: Path) -> None:
    """Both panels, into an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.2))
    names = list(PERPLEXITY)[::-1]
    colours = ["tab:blue" if name.startswith("streamprune") else "tab:grey" for name in names]
    left.bar_label(left.barh(names, [PERPLEXITY[name] for name in names], color=colours), fmt="%.0f", padding=3)
    left.axvline(DENSE_PERPLEXITY, color="black", linestyle="--", label=f"dense: {DENSE_PERPLEXITY:.0f}")
    left.set(xlim=(0, 230), xlabel="perplexity, lower is better", title="SmolLM2-135M at 2:4")
    left.legend(loc="lower right")
    right.plot(list(PEAK_MB), list(PEAK_MB.values()), "o-", label="peak of streamprune compress")
    weights = [weights_mb(blocks) for blocks in PEAK_MB]
    right.plot(list(PEAK_MB), weights, "s--", color="tab:grey", label="weights alone, float32")
    right.set(
        ylim=(0, None), xticks=list(PEAK_MB), xlabel="blocks", ylabel="MB", title="Memory does not grow with depth"
    )
    right.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", nargs="?", type=Path, default=Path("docs/overview.png"), help="the image to write")
    draw(parser.parse_args().path)
