#!/usr/bin/env bash
# Crafter 1.8.3 (NumPy 2.3.5, Python 3.12): whether an environment's seed repeats an episode.
#
# Guess: with the same seed and the same actions, all processes see the same frames.
#
# Seen, six processes, also with PYTHONHASHSEED=0: the first frames are the same, and then they part: three different
# episodes, of 140, 158 and 284 steps. Which creatures disappear is drawn from sets of objects, whose
# order goes by the objects' addresses. With hashes that are equal (crafter.objects.Object.__hash__ = lambda self: 0) all
# six are the same.
# So whoever records or compares episodes of Crafter by their seeds sets that first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check crafter==1.8.3 numpy==2.3.5

cat >episode.py <<'PYTHON'
import hashlib
import sys

import crafter
import numpy as np

if sys.argv[1] == "equal":
    crafter.objects.Object.__hash__ = lambda self: 0
env, actions = crafter.Env(seed=1), np.random.default_rng(0)
frames, done = hashlib.sha256(env.reset().tobytes()), False
steps = 0
while not done and steps < 300:
    frame, _, done, _ = env.step(int(actions.integers(17)))
    frames.update(frame.tobytes())
    steps += 1
    if steps == 1:
        first = frames.hexdigest()
print(first[:8], steps, frames.hexdigest()[:8])
PYTHON

export PYTHONHASHSEED=0
for hashes in addresses equal; do
    for _ in 1 2 3 4 5 6; do
        venv/bin/python -W ignore episode.py "$hashes"
    done | tee "$hashes"
done
test "$(cut -d' ' -f1 addresses | sort -u | wc -l)" = 1
test "$(sort -u addresses | wc -l)" -gt 1
test "$(sort -u equal | wc -l)" = 1
