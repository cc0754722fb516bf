import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import settings

from rb_noisy.recipes import Recipe

# Commands take what they are given instead of measuring what is best beside the other workers of the suite.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # pytest-xdist says 80, and the tables that tests read would be folded

# A shared or slow machine is no reason for a property to fail.
settings.register_profile("any_speed", deadline=None)
settings.load_profile("any_speed")


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are faster on one thread, and the suite may run beside other work."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A learnable four-class data set of 8x8 images: bright quadrants under noise."""
    random = np.random.default_rng(0)

    def part(count):
        y = np.arange(count) % 4
        x = random.integers(0, 120, (count, 8, 8))
        for i, label in enumerate(y):
            x[i, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 120
        return x.astype(np.uint8), y

    file = tmp_path_factory.mktemp("data") / "quadrants.npz"
    (x_train, y_train), (x_test, y_test) = part(160), part(60)
    np.savez(file, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return file


@pytest.fixture
def tiny_recipe(tiny_data):
    """A function that makes recipes on the tiny data; its keywords are recipe fields."""

    def make(**fields):
        return Recipe(
            **{
                "data": f"npz:{tiny_data}",
                "backbone": "resnet8_narrow",
                "noise": "symmetric",
                "noise_rate": 0.3,
                "eps": 0.1,
                "alpha": 0.04,
                "steps": 3,
                "epochs": 2,
                "batch_size": 32,
                "lr": 0.05,
                "augment": False,
                "normalize": False,
                "track": 40,
                "track_steps": 3,
            }
            | fields
        )

    return make
