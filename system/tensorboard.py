"""TensorBoard's event files of a run, written with tensorboardX, which is optional: it brings neither TensorFlow nor
TensorBoard."""

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from config import Config, ConfigError


def require_tensorboard(config: Config) -> None:
    """Raise a ConfigError if event files are asked for, and what writes them isn't installed."""
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "tensorboard: needs tensorboardX, which isn't installed; call pip install tensorboardX, or leave "
            "--tensorboard out"
        )


class Events:
    """The event files: metrics in the run's directory, videos in its `videos/`.

    `Log` writes the metrics of earlier starts again: they are always those of `metrics.jsonl`, no step twice and none
    missing, even if those starts wrote no event files. Videos are large, and written once.
    """

    def __init__(self, directory: Path):
        """Replace the event files of a run's directory, but not those of its videos, by an empty one."""
        for path in directory.glob("events.out.tfevents.*"):
            path.unlink()
        self.metrics_writer: Any = writer(directory)
        self.video_writer: Any = None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics, rounded to float32, as TensorBoard has them."""
        from tensorboardX import summary

        with self._stopping_nothing():
            for name, value in values.items():
                add(self.metrics_writer, step, summary.scalar(name, value))
            self.metrics_writer.flush()

    def gif(self, step: int, name: str, path: Path) -> None:
        """Write a video as it is: TensorBoard plays GIFs. (tensorboardX itself would need moviepy to make one.)"""
        from tensorboardX.proto.summary_pb2 import Summary

        with self._stopping_nothing():
            with Image.open(path) as gif:
                width, height = gif.size
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
            if self.video_writer is None:
                self.video_writer = writer(path.parent, f".{step}")
            add(self.video_writer, step, Summary(value=[Summary.Value(tag=name, image=image)]))
            self.video_writer.flush()

    @contextlib.contextmanager
    def _stopping_nothing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            print(f"Warning: TensorBoard's event files can't be written ({error.strerror}); training continues")

    def close(self) -> None:
        for opened in self.metrics_writer, self.video_writer:
            if opened is not None:
                with self._stopping_nothing():
                    opened.close()


def writer(directory: Path, suffix: str = "") -> Any:
    """Open a new event file, whose name has the time, the host and the suffix."""
    from tensorboardX.event_file_writer import EventsWriter

    return EventsWriter(str(directory / "events"), suffix)


def add(writer: Any, step: int, summary: Any) -> None:
    """Write a summary of a step, with the time of now."""
    from tensorboardX.proto.event_pb2 import Event

    writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
