"""Keys: each purpose has its own, and none is used twice."""

import jax
import numpy as np
from conftest import TINY

from config import Config
from sequences.noise import PURPOSES, example_keys, key_for, sequence_keys


def test_no_two_purposes_share_a_key():
    """Each sequence of training steps, validation batches, videos and samples of an evaluation draws its own noise."""
    c = Config(**TINY | dict(seed=3))
    keys = [key_for(purpose, c) for purpose in PURPOSES]
    training = [sequence_keys(jax.random.fold_in(key_for("train", c), step), 0, 8) for step in range(8)]
    others = [sequence_keys(key_for(purpose, c), 0, 8) for purpose in ("validation", "videos")]
    evaluation = [example_keys(c, 0, 8, sample) for sample in range(8)]
    every = np.concatenate([jax.random.key_data(x).reshape(-1, 2) for x in (*keys, *training, *others, *evaluation)])
    assert len(np.unique(every, axis=0)) == len(every) == 5 + 64 + 16 + 64


def test_example_keys_depend_only_on_example_and_sample():
    c = Config(**TINY)
    whole = jax.random.key_data(example_keys(c, 0, 5, 2))
    np.testing.assert_array_equal(whole[3:], jax.random.key_data(example_keys(c, 3, 2, 2)))
