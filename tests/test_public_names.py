"""What `import streamprune` offers is exactly this list, and every name of it is there."""

import importlib
import inspect

import pytest

import streamprune

PUBLIC = {
    "PackedLinear": "streamprune.model.packed_linear",
    "StreampruneError": "streamprune.errors",
    "compress": "streamprune.pipeline.compress",
    "evaluate": "streamprune.runtime.evaluate",
    "export": "streamprune.runtime.export",
    "inspect": "streamprune.runtime.inspect",
    "plan": "streamprune.pipeline.preview",
    "verify": "streamprune.runtime.verify",
}


def test_public_names_are_this_list() -> None:
    assert streamprune.__all__ == list(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_the_one_of_its_home_and_documented(name: str) -> None:
    value = getattr(streamprune, name)
    assert value is getattr(importlib.import_module(PUBLIC[name]), name)
    assert value.__module__ == PUBLIC[name]
    assert inspect.getdoc(value)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.islower()])
def test_commands_are_functions_with_annotations(name: str) -> None:
    signature = inspect.signature(getattr(streamprune, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'streamprune' has no attribute 'prune'"):
        streamprune.prune  # noqa: B018
