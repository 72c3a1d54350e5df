from __future__ import annotations

import pytest

from dico_kernels import native


@pytest.fixture(params=native.isas())
def isa(request):
    """Each instruction set that was compiled in and runs here."""
    with native.isa(request.param):
        yield request.param
