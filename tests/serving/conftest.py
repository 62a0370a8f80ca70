"""Tiny adapted models."""

import pytest

from tests.support.tiny_hf import CONFIGS, build_adapted


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return build_adapted(CONFIGS[request.param])


@pytest.fixture(scope="module")
def tsw():
    return build_adapted()
