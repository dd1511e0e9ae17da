#!/usr/bin/env bash
# jax 0.12.0 (Python 3.12): what of the machine is in a function that jax.export serialised.
#
# Guess: the program alone; the same source in another folder gives the same bytes.
#
# Seen: the source file's absolute path is in it, so that the bytes differ between folders. With
# jax_traceback_in_locations_limit=0 neither holds.
# So whoever publishes exported programs, or compares them, sets that while exporting.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check jax==0.12.0 jaxlib==0.12.0 flatbuffers==25.12.19

mkdir -p secret_place another_place
cat >secret_place/model.py <<'PYTHON'
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

jax.config.update("jax_traceback_in_locations_limit", int(sys.argv[1]))


def layer(x):
    return jnp.tanh(x @ jnp.ones((4, 4)))


content = export.export(jax.jit(layer), platforms=["cpu"])(jax.ShapeDtypeStruct((2, 4), jnp.float32)).serialize()
Path(sys.argv[2]).write_bytes(content)
PYTHON
cp secret_place/model.py another_place/model.py
for limit in 10 0; do
    for place in secret_place another_place; do
        venv/bin/python "$folder/$place/model.py" "$limit" "$place.$limit"
    done
    echo "limit $limit: $(grep -c secret_place "secret_place.$limit") lines with the path, $(cmp -s "secret_place.$limit" \
        "another_place.$limit" && echo equal || echo different)"
done | tee seen
printf 'limit 10: 1 lines with the path, different\nlimit 0: 0 lines with the path, equal\n' | diff seen -
