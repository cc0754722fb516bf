import os

import pytest


@pytest.fixture(autouse=True)
def alone():
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("a benchmark is measured alone: pytest tests/benchmarks -n 0")
