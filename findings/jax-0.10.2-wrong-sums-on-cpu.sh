#!/usr/bin/env bash
# jax 0.10.2 (NumPy 2.3.5, Python 3.12), the newest for Python 3.11: whether a jitted product and sum on the CPU is right.
#
# Guess: jitted code of a released version equals NumPy, but for rounding.
#
# Seen, |M x|**2 of 40000 rows x of three numbers: row 32768 and later ones are wrong, without a warning.
#     0.10.1: no wrong row        0.10.2: 7229 wrong rows, first 32768
# With 32768 rows, or with rows of 2, 8 or 64 numbers, 0.10.2 is right, too; so are 0.11.0, 0.11.2 and 0.12.0.1 with all of
# them. Reported as jax-ml/jax#39103. So 0.10.2 is excluded where Python 3.11 is supported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv

cat >rows.py <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

random = np.random.default_rng(0)
rows, matrix = (random.standard_normal((n, 3), dtype=np.float32) for n in (40_000, 3))


@jax.jit
def squared_norms(rows, matrix):
    return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)


expected = np.square(rows.astype(np.float64) @ matrix.T.astype(np.float64)).sum(1)
(wrong,) = np.nonzero(~np.isclose(squared_norms(rows, matrix), expected, rtol=1e-3, atol=1e-4))
print(len(wrong), *wrong[:1])
PYTHON
wrong_rows() {
  venv/bin/python -m pip install --quiet --disable-pip-version-check "jax==$1" "jaxlib==$1" numpy==2.3.5 &&
    JAX_PLATFORMS=cpu venv/bin/python rows.py
}
before=$(wrong_rows 0.10.1)
after=$(wrong_rows 0.10.2)
printf '0.10.1: %s\n0.10.2: %s\n' "$before" "$after"
[ "$before" = 0 ] || { echo "0.10.1 is wrong, too"; exit 1; }
[ "${after#* }" = 32768 ] || { echo "0.10.2 is right now"; exit 1; }
