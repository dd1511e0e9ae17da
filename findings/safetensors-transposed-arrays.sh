#!/usr/bin/env bash
# safetensors 0.8.0 (NumPy 2.3.5, Python 3.12): what safetensors.numpy.save makes of an array that isn't contiguous.
#
# Guess: it copies the array in order, as numpy.save does, or raises.
#
# Seen: it writes the memory as it lies there under the view's shape. A transposed matrix comes back with the right shape
# and other values, and nothing is said; so do an array in Fortran's order and a slice with steps.
# So whoever saves arrays of JAX or of transposed kernels passes numpy.ascontiguousarray(x).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.3.5

cat >views.py <<'PYTHON'
import numpy as np
from safetensors.numpy import load, save

x = np.arange(6.0).reshape(2, 3)
views = {"contiguous": x, "transposed": x.T, "Fortran's order": np.asfortranarray(x), "every other": x[:, ::2]}
for name, view in views.items():
    try:
        back = load(save({"x": view}))["x"]
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
        continue
    print(f"{name}: {view.tolist()} -> {back.tolist()}")
    assert back.shape == view.shape and (back == view).all() == (name == "contiguous")
PYTHON
venv/bin/python views.py
