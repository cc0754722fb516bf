"""Pickles are never read, since reading one runs whatever code is in it; here is what to do instead."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rb_noisy.files import UNREADABLE


def holds_pickle(path: Path) -> bool:
    """Whether an .npy file holds one Python object, such as a dict of arrays, and no array."""
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            return shape == () and dtype.hasobject
    except UNREADABLE:  # it is damaged: whoever reads it says so
        return False


def pickle_advice(path: Path) -> str:
    """What to do about a pickle, which is an .npy file of a dict, or a file of torch."""
    npz, name = path.with_suffix(".npz").name, path.name
    imports, load = "numpy, torch", f"torch.load({name!r}, weights_only=False)"
    if path.suffix == ".npy":
        imports, load = "numpy", f"numpy.load({name!r}, allow_pickle=True).item()"
    return (
        f"{path} is a pickle and no pickle is read, since that runs whatever code is in it: at your own risk write "
        f"{npz} by `import {imports}; numpy.savez({npz!r}, **{load})` and give that"
    )
