"""What `import streamprune` offers is exactly this list, and every name of it is there, documented and typed."""

import dataclasses
import importlib
import importlib.metadata
import inspect
import pydoc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

import streamprune
from streamprune.config import FIELDS, NMPattern, PruneConfig, Settings
from streamprune.errors import SettingsError

PUBLIC = {
    "CompressResult": "streamprune.pipeline.compress",
    "EvaluateResult": "streamprune.runtime.evaluate",
    "ExportResult": "streamprune.runtime.export",
    "GenerateResult": "streamprune.runtime.generate",
    "InspectResult": "streamprune.runtime.inspect",
    "PackedLinear": "streamprune.model.packed_linear",
    "PlanResult": "streamprune.pipeline.planning.preview",
    "PruneConfig": "streamprune.config",
    "StatusResult": "streamprune.cluster.status",
    "StreampruneError": "streamprune.errors",
    "SubmitResult": "streamprune.cluster.submission",
    "VerifyResult": "streamprune.runtime.verify",
    "compress": "streamprune.pipeline.compress",
    "evaluate": "streamprune.runtime.evaluate",
    "export": "streamprune.runtime.export",
    "generate": "streamprune.runtime.generate",
    "inspect": "streamprune.runtime.inspect",
    "is_finished": "streamprune.pipeline.writing.journal",
    "load": "streamprune.integrations.huggingface",
    "plan": "streamprune.pipeline.planning.preview",
    "status": "streamprune.cluster.status",
    "submit": "streamprune.cluster.submission",
    "verify": "streamprune.runtime.verify",
}
COMMANDS = ["compress", "evaluate", "export", "generate", "inspect", "plan", "status", "submit", "verify"]


def test_public_names_are_this_list() -> None:
    assert streamprune.__all__ == list(PUBLIC)
    assert dir(streamprune) == sorted([*PUBLIC, "__version__"])
    assert streamprune.__version__ == importlib.metadata.version("streamprune")
    for package in ("streamprune", "streamprune_kernels"):
        assert Path(importlib.import_module(package).__file__ or "").with_name("py.typed").exists()


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_the_one_of_its_home_and_documented(name: str) -> None:
    value = getattr(streamprune, name)
    assert value is getattr(importlib.import_module(PUBLIC[name]), name)
    assert value.__module__ == PUBLIC[name]
    assert inspect.getdoc(value)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_functions_with_annotations(name: str) -> None:
    """Each returns the result of its name, and hides no parameter behind **."""
    signature = inspect.signature(getattr(streamprune, name))
    result = signature.return_annotation
    assert (result.__name__, result) == (f"{name.capitalize()}Result", getattr(streamprune, result.__name__))
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty
        assert parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


@pytest.mark.parametrize("name", ["compress", "plan"])
def test_help_shows_every_setting(name: str) -> None:
    shown = pydoc.render_doc(getattr(streamprune, name), renderer=pydoc.plaintext)
    for field in dataclasses.fields(PruneConfig):
        default = "'2:4'" if field.name == "pattern" else repr(field.default)
        assert f" = {default}" in shown.partition(f" {field.name}: ")[2], field.name
    assert tuple(Settings.__annotations__) == FIELDS


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'streamprune' has no attribute 'prune'"):
        streamprune.prune  # noqa: B018
    for function in (streamprune.compress, streamprune.plan):
        with pytest.raises(TypeError, match="unexpected keyword argument 'sparsity'"):
            function("model", "out", sparsity=0.5)  # type: ignore[call-arg]


CONFIG = PruneConfig(metric="wanda", pattern=NMPattern(4, 8), refine=False)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"config": {"metric": "wanda"}}, r"config \{'metric': 'wanda'\} is no PruneConfig"),
        ({"config": CONFIG, "metric": "ria"}, "metric is ria by keyword and wanda in config; give one"),
        ({"config": CONFIG, "pattern": "2:4"}, "pattern is 2:4 by keyword and 4:8 in config; give one"),
        ({"config": CONFIG, "correction": 0.2}, r"correction is 0\.2 by keyword and 0\.0 in config; give one"),
        ({"config": CONFIG, "refine": True}, "refine is True by keyword and False in config; give one"),
        ({"pattern": 24}, "pattern 24 is not N:M"),
        ({"metric": ["wanda"]}, r"metric \['wanda'\] is none of"),
        ({"shuffle": 3}, "shuffle 3 is not none, nor"),
        ({"reconstruct": "yes"}, "reconstruct 'yes' is neither true nor false"),
        ({"refine": 1}, "refine 1 is neither true nor false"),
        ({"restart": "yes"}, "restart 'yes' is neither true nor false"),
        ({"device": 0}, "device 0 is none of auto, cpu, cuda"),
        ({"dtype": ["float32"]}, r"dtype \['float32'\] is none of"),
        ({"text_column": 0}, "text_column 0 is no string"),
        ({"calibration": 5}, "calibration 5 is no path, no name, and no iterable of strings"),
        ({"calibration": b"text"}, "calibration b'text' is no path"),
        ({"calibration": {"text": "a"}}, "calibration .* is no path"),
        ({"calibration": "a\0b"}, r"calibration 'a\\x00b' is no path"),
        ({"scratch": 5}, "scratch 5 is no path"),
        ({"model": 5}, "model 5 is no path"),
        ({"model": b"/models"}, "model b'/models' is no path"),
        ({"out": 5}, "out 5 is no path"),
        ({"correction": 0.1, "refine": False}, r"correction 0\.1 needs second moments"),
        ({"alpha": 2, "metric": "wanda"}, r"alpha 2\.0 has no effect with metric wanda; leave it out"),
        ({"relative": True, "metric": "ria"}, "relative True has no effect with metric ria"),
        ({"objective": "energy", "shuffle": "none"}, "objective energy has no effect without a shuffle"),
        ({"fold": "across-heads", "shuffle": "residual"}, "fold across-heads has no effect without a shuffle"),
        ({"shuffle_block": 32}, "shuffle_block 32 has no effect without the local shuffle"),
        ({"shrinkage": 0.5, "refine": False}, r"shrinkage 0\.5 has no effect without refinement or reconstruction"),
        ({"correction_stride": 1, "correction": 0}, "correction_stride 1 has no effect without correction"),
        ({"on_excess": "warn"}, r"on_excess warn has no effect without a budget \(max_block_error\)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], line: str) -> None:
    """By compress and plan alike, before anything is opened."""
    for function in (streamprune.compress, streamprune.plan):
        with pytest.raises(SettingsError, match=f"^{line}"):
            function(**{"model": "nowhere", "out": "out", **settings})


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("compress", {"out": "out", "progress": 1}, "progress 1 is neither true nor false"),
        ("compress", {"out": "out", "should_stop": True}, "should_stop True is no function"),
        ("evaluate", {"text": 5}, "text 5 is no path"),
        ("evaluate", {"text": "t", "text_column": None}, "text_column None is no string"),
        ("evaluate", {"text": "t", "device": []}, r"device \[\] is none of"),
        ("evaluate", {"text": "t", "scratch": 5}, "scratch 5 is no path"),
        ("export", {"out": 5}, "out 5 is no path"),
        ("export", {"out": "out", "to": "gguf"}, "to 'gguf' is none of dense"),
        ("generate", {"prompt": 5}, "prompt 5 is neither a string nor a list of strings"),
        ("generate", {"prompt": ["a", 5]}, r"prompt \['a', 5\] is neither a string nor a list"),
        ("generate", {"prompt": "a", "prompt_file": 5}, "prompt_file 5 is no path"),
        ("generate", {}, "no prompt; give --prompt TEXT or --prompt-file FILE"),
        ("generate", {"prompt": ["a", ""]}, "prompt 2 is empty"),
        ("generate", {"prompt": "a", "max_memory": "much"}, "'much' is not a number of bytes"),
        ("generate", {"prompt": "a", "on_text": 5}, "on_text 5 is no function"),
        ("verify", {"quick": "no"}, "quick 'no' is neither true nor false"),
        ("verify", {"source": 5}, "source 5 is no path"),
    ],
)
def test_other_settings_that_make_no_sense(name: str, settings: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"^{line}"):
        getattr(streamprune, name)(tmp_path, **settings)
    with pytest.raises(SettingsError, match="5 is no path"):
        getattr(streamprune, name)(5, **{key: value for key, value in settings.items() if key in ("out", "text")})


def test_a_config_says_what_keywords_say(
    prune: Callable[..., Any], outputs: Callable[..., Path], sources: Callable[[str], Path], tmp_path: Path
) -> None:
    """Alone, and beside keywords that agree with it: the same bytes as by keywords alone."""
    settings: dict[str, Any] = {"metric": "wanda", "pattern": "4:8", "refine": False, "shuffle": "none"}
    config = PruneConfig(**{**settings, "pattern": NMPattern(4, 8)})
    assert PruneConfig(**settings) == config
    agreeing: list[dict[str, Any]] = [{}, settings, {"refine": None, "correction": None, "alpha": 1}]
    for number, keywords in enumerate(agreeing):
        prune("llama", tmp_path / str(number), config=config, **keywords)
        assert tiny.digests(tmp_path / str(number)) == tiny.digests(outputs("llama", **settings))
    plans = [streamprune.plan(sources("llama"), **keywords) for keywords in (settings, {"config": config})]
    assert plans[0].written_bytes == plans[1].written_bytes


def test_texts_as_calibration(
    sources: Callable[[str], Path], calibration: Path, outputs: Callable[..., Path], tmp_path: Path
) -> None:
    """A path, a list of strings and a generator of the same text give the same bytes: identity is by the tokens."""

    def lines() -> Iterator[str]:
        yield calibration.read_text()

    expected = tiny.digests(outputs("llama"))
    for number, texts in enumerate([calibration, [calibration.read_text()], lines()]):
        streamprune.compress(sources("llama"), tmp_path / str(number), calibration=texts, **tiny.CALIBRATION)
        assert tiny.digests(tmp_path / str(number)) == expected
    with pytest.raises(SettingsError, match="the given texts: item 2 is int; give strings"):
        streamprune.compress(sources("llama"), tmp_path / "out", calibration=["a", 5], **tiny.CALIBRATION)  # type: ignore[list-item]
    with pytest.raises(streamprune.StreampruneError, match="the given texts: 3 tokens make 0 windows"):
        streamprune.compress(sources("llama"), tmp_path / "out", calibration=["abc"], **tiny.CALIBRATION)
    with pytest.raises(SettingsError, match="the given texts: has no columns"):
        streamprune.compress(
            sources("llama"), tmp_path / "out", calibration=["abc"], text_column="body", **tiny.CALIBRATION
        )
