"""Predictions of a trained model for its test sequences."""

from collections.abc import Iterator

import numpy as np
from jax import Array
from tqdm import tqdm

import data
import tools
from analyses.arguments import TrainedModel
from config import ConfigError
from sequences import rollout
from sequences.noise import example_keys
from system.devices import Devices
from training import loading
from training.models import make_model


class Worker:
    """A trained model with its parameters on this process's devices, and its test sequences."""

    def __init__(self, run: TrainedModel):
        self.config = run.config
        self.name = run.name
        self.model = make_model(run.config)
        self.test = data.windows(run.config, "test")
        self.devices = Devices()
        self.params = loading.load_params(self.model, run.checkpoint)
        self.count = min(run.config.num_examples, len(self.test))

    def sequence(self, number: int) -> data.Window:
        """Return a test sequence by its number; raise ConfigError if there is none."""
        if number >= len(self.test):
            raise ConfigError(f"example: there are {len(self.test)} test sequences; name one from 0, got {number}")
        return data.window(self.test, number)

    def batches(self, source: data.Windows | None = None) -> Iterator[tuple[int, int, data.Batch]]:
        """Yield batches of all windows of a source; None: of the test sequences that `num_examples` counts.

        Yields:
            The number of the first sequence, the number of sequences, and the batch, whose other rows are padding.
        """
        source, count = (self.test, self.count) if source is None else (source, len(source))
        size = min(self.config.batch_size, count)
        batches = data.eval_batches(source, size, count, self.devices.rows(size))
        with tqdm(total=count, desc=self.name, unit="sequence", dynamic_ncols=True) as bar:
            for number, batch in enumerate(batches):
                valid = int(batch.weight.sum())
                yield number * size, valid, batch
                bar.update(valid)

    def keys(self, first: int, rows: int, sample: int = 0) -> Array:
        """Return the PRNG keys that eval.py uses, so that samples are the same, [B]."""
        return example_keys(self.config, first, rows, sample)

    def predictions(self, batch: data.Batch, first: int, sample: int) -> np.ndarray:
        """Return the frames after the context as eval.py predicts them, uint8 [B, T, H, W, C]."""
        keys = self.keys(first, len(batch.video), sample)
        sample_frames = rollout.predict(self.model, self.params, batch.video, keys, self.devices.put, batch.actions)
        return tools.joined(sample_frames.prediction)

    def reconstructions(self, batch: data.Batch, first: int) -> np.ndarray:
        """Return the same frames as reconstructed by the posterior, which sees them: an upper bound for predictions."""
        keys = self.keys(first, len(batch.video))
        chunks = rollout.reconstruct(self.model, self.params, batch.video, keys, self.devices.put, batch.actions)
        return tools.joined(chunks)
