"""One run on a real model, SmolLM2-135M, checked by numpy code that shares nothing with streamprune.

`make inputs` makes the model and the texts.
"""

import subprocess
import sys
from pathlib import Path

import numpy
import packed_reader
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from streamprune import compress, evaluate, export, verify
from streamprune.config import PruneConfig
from streamprune.errors import Interrupted
from streamprune.pruning.metrics import esparse_factor, score
from streamprune.pruning.statistics import StatisticsAccumulator
from streamprune.text.calibration import Calibration, calibration_tokens

DEMO = Path(__file__).parent.parent / "demo"
MODEL, CALIBRATION, WIKI = DEMO / "smollm2-135m", DEMO / "text/calibration.txt", DEMO / "text/wiki.txt"
SAMPLES, LENGTH = 4, 256
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

COMPRESS = f"""
import sys, streamprune, streamprune.process
streamprune.process.map_large_pieces()
streamprune.compress(sys.argv[1], sys.argv[2], calibration=sys.argv[3], samples={SAMPLES}, sequence_length={LENGTH})
"""
LOAD_DENSE = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
"""
# The peak beyond what the libraries take, once all weights have been looked at: they are mapped from the files.
LOAD_PACKED = """
import sys, torch, streamprune
import transformers.models.llama.modeling_llama
def resident(name):
    return [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name)][0]
before = resident("VmRSS")
model = streamprune.load(sys.argv[1], device="cpu")
looked_at = [parameter.view(torch.uint8).max() for parameter in model.parameters()]
size = sum(parameter.nbytes for parameter in model.parameters())
print((resident("VmHWM") - before) / size)
"""
# Not ru_maxrss: a process inherits that of the one which started it, and this one has held the dense model.
PRINT_PEAK = """
print([int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def peak_memory_bytes(code: str, *arguments: object) -> int:
    """Largest resident set of a new process that runs `code`."""
    command = [sys.executable, "-c", code + PRINT_PEAK, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def model() -> Path:
    for path in (MODEL / "config.json", CALIBRATION, WIKI):
        if not path.exists():
            pytest.fail(f"{path} is missing: run `make inputs`")
    return MODEL


@pytest.fixture(scope="session")
def source(model: Path) -> dict[str, torch.Tensor]:
    return tiny.read_tensors(model)


@pytest.fixture(scope="session")
def plain(model: Path) -> PreTrainedModel:
    """The dense model as transformers loads it, in fp32."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The default method at 2:4 on 4 x 256 tokens, in a process of its own: the output and the peak memory."""
    out = tmp_path_factory.mktemp("real") / "pruned"
    return out, peak_memory_bytes(COMPRESS, model, out, CALIBRATION)


def test_one_sequence_at_a_time_and_nothing_read_ahead_give_the_same_bytes(
    model: Path, pruned: Path, tmp_path: Path
) -> None:
    """Of matrices as large as real ones, for which a BLAS chooses its way by their sizes."""
    amount = {"calibration": str(CALIBRATION), "samples": SAMPLES, "sequence_length": LENGTH}
    compress(model, tmp_path / "out", **amount, micro_batch=1, prefetch=0)
    assert tiny.digests(tmp_path / "out") == tiny.digests(pruned)


@pytest.fixture(scope="session")
def pruned(run: tuple[Path, int]) -> Path:
    return run[0]


@pytest.fixture(scope="session")
def activations(model: Path, plain: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs of block 0's linear layers on the calibration tokens, [tokens, in], by plain transformers and hooks."""
    tokens = calibration_tokens(model, Calibration(str(CALIBRATION), samples=SAMPLES, sequence_length=LENGTH))
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for name, module in plain.model.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear):
            seen[name] = []
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0][0])))
    with torch.inference_mode():
        for row in tokens:
            plain.model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def tokenize(model: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"]


def packed_shares(packed: packed_reader.PackedFolder, source: dict[str, torch.Tensor]) -> list[float]:
    """Of each layer: bytes of values and mask over those of the dense weight."""
    return [
        sum(packed.tensors[f"{name}.{part}"].nbytes for part in ("weight_values", "weight_mask"))
        / source[f"{name}.weight"].nbytes
        for name in packed.patterns
    ]


def test_every_group_keeps_two_of_four_and_every_kept_bit_is_the_sources(
    pruned: Path, source: dict[str, torch.Tensor]
) -> None:
    packed = packed_reader.PackedFolder(pruned)
    kept = packed.check_against(source)
    linear = {name for name in source if ".layers." in name and source[name].ndim == 2}
    assert len(linear) == 210
    assert {f"{name}.weight" for name in packed.patterns} == linear
    assert kept * 2 == sum(source[name].numel() for name in linear)
    shares = packed_shares(packed, source)
    assert max(shares) <= 0.5626
    layers = [layer for block in tiny.read_json(pruned / tiny.MANIFEST)["blocks"] for layer in block["layers"]]
    recorded = {layer["name"]: layer["packed_bytes"] / layer["dense_bytes"] for layer in layers}
    assert recorded == dict(zip(packed.patterns, shares, strict=True))


def test_four_of_eight(model: Path, source: dict[str, torch.Tensor], tmp_path: Path) -> None:
    compress(
        model, tmp_path / "out", pattern="4:8", metric="magnitude", shuffle="none", calibration=str(CALIBRATION),
        samples=1, sequence_length=16,
    )  # fmt: skip
    packed = packed_reader.PackedFolder(tmp_path / "out")
    assert list(packed.patterns.values()) == [(4, 8)] * 210
    assert packed.check_against(source) * 2 == sum(source[f"{name}.weight"].numel() for name in packed.patterns)
    assert max(packed_shares(packed, source)) <= 0.5626


def test_verified_against_its_source(pruned: Path, model: Path) -> None:
    verification = verify(pruned, source=model)
    assert verification.faults == []
    assert verification.against_source
    assert len(verification.layers) == 210
    assert all(layer.ok and layer.relative_error < 3e-6 for layer in verification.layers)


def test_shuffles_never_lose_and_nearly_always_gain(pruned: Path) -> None:
    blocks = tiny.read_json(pruned / tiny.MANIFEST)["blocks"]
    layers = {layer["name"]: layer for block in blocks for layer in block["layers"]}
    assert len(layers) == 210
    for block in blocks:
        for group in GROUPS:
            members = [layer for layer in block["layers"] if layer["name"].endswith(group)]
            assert len(members) == len(group)
            steps = [{step["name"]: step["retained_score"] for step in layer["steps"]} for layer in members]
            found = [step.get("shuffle", step["selection"]) for step in steps]
            assert sum(found) >= sum(step["selection"] for step in steps)
    raised = [layer["steps"][1]["retained_score"] > layer["steps"][0]["retained_score"] for layer in layers.values()]
    assert {layer["steps"][1]["name"] for layer in layers.values()} == {"shuffle"}
    assert sum(raised) >= 0.9 * len(raised)


def test_refinement_lowers_what_it_aims_at_in_every_layer_and_names_its_shrinkage(pruned: Path) -> None:
    """A layer's own output error may rise: its mask gives some of it to undo the error of the blocks before."""
    blocks = tiny.read_json(pruned / tiny.MANIFEST)["blocks"]
    lowered = []
    for block in blocks:
        for layer in block["layers"]:
            shuffled, refined = layer["steps"][-2:]
            assert refined["name"] == "refinement"
            assert len(layer["shrinkage"]) == 1
            lowered.append(shuffled["corrected_error"] - refined["corrected_error"])
    assert len(lowered) == 210
    assert min(lowered) > 0
    first = [layer["steps"] for layer in blocks[0]["layers"]]  # no block before it: nothing to undo
    assert all(steps[-1]["output_error"] < 0.95 * steps[-2]["output_error"] for steps in first)


def numpy_entropy(x: numpy.ndarray, bins: int) -> numpy.ndarray:
    """Entropy in nats of each column, by numpy.histogram."""
    entropies = []
    for column in x.T:
        counts, _ = numpy.histogram(column, bins=bins)
        p = counts[counts > 0] / counts.sum()
        entropies.append(-(p * numpy.log(p)).sum())
    return numpy.array(entropies)


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "mlp.down_proj"])
def test_esparse_scores_are_those_of_numpy_on_real_activations(
    layer: str, activations: dict[str, torch.Tensor], source: dict[str, torch.Tensor]
) -> None:
    x, weight = activations[layer].double().numpy(), source[f"model.layers.0.{layer}.weight"]
    entropy, norm = numpy_entropy(x, bins=100), numpy.sqrt((x**2).sum(axis=0))
    expected = numpy.abs(weight.double().numpy()) * (entropy + 1.0 * norm)

    exact = weight.double().abs() * esparse_factor(torch.from_numpy(entropy), torch.from_numpy(norm), 1.0)
    numpy.testing.assert_allclose(exact.numpy(), expected, rtol=1e-12)

    accumulator = StatisticsAccumulator(x.shape[1], PruneConfig(refine=False), torch.device("cpu"))
    for sequence in activations[layer].split(LENGTH):
        accumulator.add(sequence)
    statistics = accumulator.result()
    assert statistics.entropy is not None
    error = numpy.abs(statistics.entropy.numpy() - entropy)
    assert error.mean() <= 0.01
    assert error.max() <= 0.05
    streamed = score(weight, statistics, PruneConfig()).double().numpy()
    bound = numpy.abs(weight.double().numpy()) * (error + 1e-5 * (entropy + norm)) + 1e-30
    assert (numpy.abs(streamed - expected) <= bound).all()
    numpy.testing.assert_allclose(streamed, expected, rtol=0.01)


def test_wanda_masks_are_those_of_a_wanda_in_five_lines(
    model: Path, activations: dict[str, torch.Tensor], source: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Block 0, whose inputs no pruning has changed. Only groups within rounding of a tie may differ."""
    out = tmp_path / "out"

    def should_stop() -> bool:
        return (out / ".work/block-00000.json").exists()

    with pytest.raises(Interrupted):
        compress(
            model, out, metric="wanda", shuffle="none", refine=False, calibration=str(CALIBRATION), samples=SAMPLES,
            sequence_length=LENGTH, dtype="float32", should_stop=should_stop,
        )  # fmt: skip
    written = packed_reader.open_folder(out)
    for name, x in activations.items():
        weight = source[f"model.layers.0.{name}.weight"].double()
        scores = weight.abs() * x.double().square().sum(dim=0).sqrt()
        groups = scores.view(len(scores), -1, 4)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(
            2, groups.argsort(dim=2, descending=True, stable=True)[:, :, :2], True
        )
        mask = written[f"model.layers.0.{name}.weight_mask"].numpy()
        stored = torch.from_numpy(numpy.unpackbits(mask, axis=1, bitorder="little").astype(bool)).view(keep.shape)
        ordered = groups.sort(dim=2, descending=True).values
        tie = (ordered[:, :, 1] - ordered[:, :, 2]) <= 1e-6 * ordered[:, :, 1]
        assert ((stored == keep).all(dim=2) | tie).all(), name
        assert tie.float().mean() < 0.2


def test_dense_evaluation_agrees_with_transformers(model: Path, plain: PreTrainedModel) -> None:
    length, count = 256, 4
    ids = tokenize(model, WIKI.read_text()[:20_000])
    with torch.inference_mode():
        losses = [float(plain(w, labels=w).loss) for w in list(tiny.windows(ids, length))[:count]]
    expected = sum(losses) / count
    result = evaluate(model, text=WIKI, sequence_length=length, max_tokens=length * count, dtype="float32")
    assert result.tokens == length * count
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(numpy.exp(expected), rel=1e-4)


def test_dense_export_computes_what_the_packed_model_does(pruned: Path, model: Path, tmp_path: Path) -> None:
    export(pruned, out=tmp_path / "dense")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    (window,) = tiny.windows(tokenize(model, WIKI.read_text()[:4_000])[:256], 256)
    with torch.inference_mode():
        loss = float(exported(window, labels=window).loss)
    packed = evaluate(pruned, text=WIKI, sequence_length=256, max_tokens=256, dtype="float32")
    assert packed.packed
    assert packed.loss == pytest.approx(loss, rel=1e-5)


def test_peak_memory_is_below_that_of_loading_the_dense_model(run: tuple[Path, int], model: Path) -> None:
    out, ours = run
    assert ours < peak_memory_bytes(LOAD_DENSE, model)
    recorded = tiny.read_json(out / "timings.json")["peak_memory_bytes"]
    assert recorded == pytest.approx(ours, rel=0.05)


def test_loading_packed_weights_takes_little_more_than_they_do(pruned: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD_PACKED, str(pruned)], stdout=subprocess.PIPE, text=True, check=True
    )
    assert float(done.stdout) <= 1.25  # 1.1, and the code of libraries that comes with the first model
