"""Broken kernels are noticed, whole ones are not (cuda_tools/mutants.py, mutation.py)."""

import re
from pathlib import Path

import pytest
from cuda_tools.mutants import MUTANTS
from cuda_tools.mutation import CASES, noticed_by_host, noticed_by_ptx, outcome

from streamprune_kernels.launch import FOLDER

BY_NAME = {mutant.name: mutant for mutant in MUTANTS}
TABLE = Path(__file__).parents[3] / "docs" / "kernels.md"


@pytest.mark.parametrize("case", CASES)
def test_whole_kernels_pass_on_the_shim(case):
    assert noticed_by_host(None, case) is None


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_whole_kernels_pass_as_ptx(case):
    assert noticed_by_ptx(None, case) is None


@pytest.mark.parametrize(
    "name",
    ["no barrier before a stage is read", "W expanded into the tile being read", "padding that is undefined behaviour"],
)
def test_the_shim_notices(name):
    assert noticed_by_host(BY_NAME[name], BY_NAME[name].case)


def test_the_interpreter_notices_what_stands_in_assembly():
    mutant = BY_NAME["A's second and third register exchanged"]
    assert noticed_by_ptx(mutant, mutant.case)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_every_mutant_is_noticed(name):
    assert any(outcome(BY_NAME[name]))


@pytest.mark.parametrize("name", BY_NAME)
def test_every_mutant_is_another_text(name):
    mutant = BY_NAME[name]
    assert mutant.text(mutant.file, lambda file: (FOLDER / file).read_text()) != (FOLDER / mutant.file).read_text()


def test_the_table_has_every_mutant():
    rows = re.findall(r"^\| (\w+\.cuh?) \| (.+?) \| .+ \| .+ \|$", TABLE.read_text(), re.MULTILINE)
    assert [(mutant.file, mutant.name) for mutant in MUTANTS] == rows
