"""Windows have no kernel: the CPU decodes them."""

from __future__ import annotations

import numpy as np
import pytest

import sfpformat
from sfpformat import PRESETS, Uniform
from sfpformat.engines.cuda.recipe import make_recipe
from sfpformat.numpy import save

W = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)


@pytest.mark.parametrize("options", [PRESETS["speed"], PRESETS["speed"].but(quantiser=Uniform(bits=3))])
def test_a_tensor_with_windows_has_no_recipe_so_that_the_cpu_decodes_it(options: sfpformat.Options) -> None:
    for window, is_none in ((3, True), (None, False)):
        with sfpformat.open(save({"w": W}, options=options.but(window=window))) as file:
            entry = file.entry("w")
            assert entry.fingerprints is not None
            assert entry.fingerprints.table.window == window
            assert (make_recipe(entry, {}) is None) == is_none
