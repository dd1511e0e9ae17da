"""TensorBoard's event files of a run.

They are written with the optional package tensorboardX, which needs neither TensorFlow nor TensorBoard.
"""

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from config import Config, ConfigError


def require_tensorboard(config: Config) -> None:
    """Raise ConfigError if event files are asked for, but tensorboardX isn't installed."""
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "tensorboard: needs tensorboardX, which isn't installed; call pip install tensorboardX, or leave "
            "--tensorboard out"
        )


class Events:
    """The event files of a run: metrics in its directory, videos in its `videos/`.

    `Log` writes the metrics of earlier starts again, so that they are always those of `metrics.jsonl`: no step is
    missing or repeated, even if an earlier start wrote no event files. Videos are large, and are written once.
    """

    def __init__(self, directory: Path):
        """Replace the event files of metrics in a run's directory by an empty one. Those of videos are kept."""
        for path in directory.glob("events.out.tfevents.*"):
            path.unlink()
        self.metrics_writer: Any = open_writer(directory)
        self.video_writer: Any = None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step. TensorBoard rounds them to float32."""
        from tensorboardX import summary

        with self._warn_on_failure():
            for name, value in values.items():
                add_summary(self.metrics_writer, step, summary.scalar(name, value))
            self.metrics_writer.flush()

    def gif(self, step: int, name: str, path: Path) -> None:
        """Write a GIF as it is, since TensorBoard plays GIFs. (tensorboardX itself would need moviepy to make one.)"""
        from tensorboardX.proto.summary_pb2 import Summary

        with self._warn_on_failure():
            with Image.open(path) as gif:
                width, height = gif.size
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
            if self.video_writer is None:
                self.video_writer = open_writer(path.parent, f".{step}")
            add_summary(self.video_writer, step, Summary(value=[Summary.Value(tag=name, image=image)]))
            self.video_writer.flush()

    @contextlib.contextmanager
    def _warn_on_failure(self) -> Iterator[None]:
        """Print a warning if event files can't be written."""
        try:
            yield
        except OSError as error:
            print(f"Warning: TensorBoard's event files can't be written ({error.strerror}); training continues")

    def close(self) -> None:
        for writer in self.metrics_writer, self.video_writer:
            if writer is not None:
                with self._warn_on_failure():
                    writer.close()


def open_writer(directory: Path, suffix: str = "") -> Any:
    """Open a new event file. Its name contains the time, the host and the suffix."""
    from tensorboardX.event_file_writer import EventsWriter

    return EventsWriter(str(directory / "events"), suffix)


def add_summary(writer: Any, step: int, summary: Any) -> None:
    """Write a summary of a step, with the current time."""
    from tensorboardX.proto.event_pb2 import Event

    writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
