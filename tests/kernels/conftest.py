"""What tests of the processor's kernels stand on."""

import ctypes

import pytest

from streamprune_kernels import library


@pytest.fixture(scope="module")
def compiled() -> None:
    """Without the library every comparison would be of the plain version with itself."""
    assert isinstance(library(), ctypes.CDLL), "the package was built without its compiled kernels"
