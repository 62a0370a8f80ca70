"""Tiny adapted models, and the exported ones of tests/hf."""

import pytest

from tests.hf.conftest import exported, saved, tokenizer, use_modules_cache  # noqa: F401 (fixtures)
from tests.support.tiny_hf import CONFIGS, build_adapted


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return build_adapted(CONFIGS[request.param])


@pytest.fixture(scope="module")
def tsw():
    return build_adapted()
