from __future__ import annotations

import pytest
import torch
from ops_cases import CASES, backends, device_of
from support import PLACES

import dico_kernels as dk


@pytest.fixture(params=backends())
def backend(request):
    """Each backend that executes here, strictly: a silent fallback would test another one."""
    with dk.backend(request.param, strict=True):
        yield request.param


@pytest.fixture
def device(backend):
    return device_of(backend)


@pytest.fixture(params=PLACES)
def place(request):
    """Each kind of device there is, whatever runs there."""
    return request.param


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that an element a kernel forgets shows."""

    def poison(allocate):
        def call(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
