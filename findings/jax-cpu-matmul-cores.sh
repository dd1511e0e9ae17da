#!/usr/bin/env bash
# jax 0.12.0 (NumPy 2.3.5, Python 3.12, Linux): whether a product of matrices depends on the number of CPU cores.
#
# Guess: the threads share each long sum, so any product with long sums has other last bits on two cores than on one.
#
# Seen: a.T @ b, as in the gradient of a Dense's kernel, has. The same product with a.T stored row by row has the same
# bits. On one number of cores, each call gives the same bits. Digests of 400 x 100000 x 32, each kind of product:
#     1 core    e91fb593 c0d8b17a
#     2 cores   111f395e c0d8b17a
# So a training on a CPU repeats bit by bit only on as many cores, and equal forward passes don't show that it will.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check jax==0.12.0 jaxlib==0.12.0 numpy==2.3.5

cat >product.py <<'PYTHON'
import hashlib
import os
import sys

cores = sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]
assert len(cores) == int(sys.argv[1]), "needs two cores"
os.sched_setaffinity(0, cores)

import jax  # noqa: E402  # it counts the cores
import numpy as np  # noqa: E402

random = np.random.default_rng(0)
a, b = (random.standard_normal((100_000, n), dtype=np.float32) for n in (400, 32))


def digest(function, *arguments):
    compiled = jax.jit(function)
    (only,) = {hashlib.sha256(np.asarray(compiled(*arguments)).tobytes()).hexdigest()[:8] for _ in range(10)}
    return only


print(digest(lambda a, b: a.T @ b, a, b), digest(lambda rows, b: rows @ b, np.ascontiguousarray(a.T), b))
PYTHON
export JAX_PLATFORMS=cpu
one=$(venv/bin/python product.py 1)
two=$(venv/bin/python product.py 2)
printf '1 core    %s\n2 cores   %s\n' "$one" "$two"
[ "${one% *}" != "${two% *}" ] || { echo "the gradient is the same on two cores now"; exit 1; }
[ "${one#* }" = "${two#* }" ] || { echo "the product of rows differs on two cores now"; exit 1; }
