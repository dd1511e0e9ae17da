"""Record episodes from an environment, for `dataset: episodes`: python record.py --env dot --steps 100 ...

docs/episodes.md describes environments, policies and files.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import config as configuration
from config import FRAME_SIZE, ConfigError, Flag, whole_number
from system.files import replace_file
from videos import environments
from videos.decoded import one_process
from videos.environments import ActionSpace, Environment
from videos.walking import Walker

STICKY = 0.9
"""The probability that the policy `sticky` repeats its last action."""

POLICIES = ("random", "sticky", "walk")

KEYS = ("image", "action", "reward", "is_first", "is_last", "is_terminal")

Policy = Callable[[Mapping[str, Any]], Any]
"""Observations by name -> action."""


@dataclass(frozen=True)
class Recording:
    """The settings that all episodes of a recording share."""

    env: str
    policy: str = "random"
    seed: int = 0
    steps: int | None = None


# ---------------------------------------------------------------------------------------------- an episode


def record_episode(recording: Recording, split: str, number: int) -> dict[str, np.ndarray]:
    """Record an episode, which depends only on the arguments.

    Args:
        recording: what to record.
        split: train or test.
        number: which episode of the split.

    Returns:
        image: uint8 [T, 64, 64, C].
        action: float32 [T, A]; each led to its image, and the first one is zeros.
        reward: float32 [T]; each was received with its image.
        is_first, is_last, is_terminal: bool [T].
        The environment's other observations, [T, ...] each, by their names.

    Raises:
        ConfigError: the environment or the policy fails.
    """
    sequence = np.random.SeedSequence([recording.seed, ("train", "test").index(split), number])
    env_seed, policy_seed, common_seed = (int(word) >> 1 for word in sequence.generate_state(3))
    random.seed(common_seed)  # some environments use these global generators
    np.random.seed(common_seed)  # noqa: NPY002
    try:
        environment = environments.make(recording.env, env_seed)
        with contextlib.closing(environment):
            if not environment.limited and recording.steps is None:
                raise ConfigError(f"steps: {recording.env} has no time limit; set --steps, the frames of an episode")
            return play(environment, make_policy(recording.policy, environment.space, policy_seed), recording.steps)
    except ConfigError:
        raise
    except Exception as error:  # environments and policies are the user's code and can raise anything
        origin = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}, at {origin.filename}:{origin.lineno}"
        raise ConfigError(
            f"env: {recording.env}, with policy {recording.policy}, fails in episode {number} of {split} ({reason})"
        ) from None


def play(environment: Environment, policy: Policy, steps: int | None) -> dict[str, np.ndarray]:
    """Play an episode of at most `steps` frames, and return it as `record_episode` does."""
    step = environment.reset()
    frames, observations, rewards = [to_frame(step.frame)], [observed_arrays(step.others)], [0.0]
    actions = [np.zeros(environment.space.size, np.float32)]
    while not step.last and len(frames) != steps:
        action = np.asarray(policy({**observations[-1], "image": frames[-1]}))
        actions.append(environment.space.vector(action))
        step = environment.step(action)
        frames.append(to_frame(step.frame))
        observations.append(observed_arrays(step.others))
        rewards.append(float(step.reward))
    last = np.arange(len(frames)) == len(frames) - 1
    episode = {
        "image": np.stack(frames),
        "action": np.stack(actions),
        "reward": np.array(rewards, np.float32),
        "is_first": np.arange(len(frames)) == 0,
        "is_last": last,
        "is_terminal": last & bool(step.terminal),
    }
    for name in observations[0]:
        with contextlib.suppress(KeyError, ValueError):  # its shape varies, or it is missing in some frames
            episode[name] = np.stack([observed[name] for observed in observations])
    return episode


def to_frame(frame: Any) -> np.ndarray:
    """Return a frame as uint8 [64, 64, C].

    A frame of another size is scaled by area, and is distorted if it isn't square.

    Raises:
        ConfigError: the frame isn't uint8 [H, W], [H, W, 1] or [H, W, 3].
    """
    pixels = np.array(frame)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ConfigError(
            f"env: frames must be uint8 [H, W, 1 or 3], got {pixels.dtype} {list(pixels.shape)}; name another "
            "environment"
        )
    size = (FRAME_SIZE, FRAME_SIZE)
    if pixels.shape[:2] == size:
        return pixels
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(pixels[..., i])).resize(size, Image.Resampling.BOX))
        for i in range(pixels.shape[2])
    ]
    return np.stack(channels, -1)


def observed_arrays(observations: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return copies of the observations that are arrays of numbers or text.

    The name of an observation is prefixed with `obs_` if the file needs that name itself.
    """
    arrays = {}
    for name, value in observations.items():
        with contextlib.suppress(ValueError):  # a list of arrays of several shapes
            array = np.array(value)
            if array.dtype.kind in "biufU":
                taken = *KEYS, "file", "allow_pickle"  # the last two are parameters of NumPy's savez
                arrays[f"obs_{name}" if name in taken else str(name)] = array
    return arrays


# ---------------------------------------------------------------------------------------------- policies


def make_policy(name: str, space: ActionSpace, seed: int) -> Policy:
    """Return the policy for an episode: random, sticky, walk or module:function.

    Raises:
        ConfigError: there is no such module or function.
    """
    if name in ("random", "sticky"):
        generator, last = np.random.default_rng(seed), None

        def policy(observations: Mapping[str, Any]) -> np.ndarray:
            nonlocal last
            if last is None or name == "random" or generator.random() >= STICKY:
                last = space.draw(generator)
            return last

        return policy
    if name == "walk":
        return Walker(seed)
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"policy: {error}; name {', '.join(POLICIES)}, or a module:function that can be imported"
        ) from None
    return make(space, seed)


# ---------------------------------------------------------------------------------------------- processes


def record_requested(connection: Any, recording: Recording) -> None:
    """Record the episodes that are requested through a connection, until it is closed.

    A request is a split and a number. The answer is the split, the number, the episode as a compressed NPZ, its number
    of frames, and the versions of the environment's packages; or a ConfigError, after which the process ends.
    """
    sys.path.append(os.getcwd())  # the user's modules of policies and environments are there
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            split, number = connection.recv()
            buffer = io.BytesIO()
            try:
                episode = record_episode(recording, split, number)
            except ConfigError as error:
                connection.send(error)
                return
            arrays: Any = episode
            np.savez_compressed(buffer, **arrays)
            packages = environments.versions(recording.env)
            connection.send((split, number, buffer.getvalue(), len(episode["image"]), packages))


def record_in_processes(
    recording: Recording, tasks: Sequence[tuple[str, int]], processes: int
) -> Generator[tuple[str, int, bytes, int, dict[str, str]]]:
    """Yield the answers of `record_requested` to tasks (split, number), in any order, from several processes.

    Raises:
        ConfigError: an episode can't be recorded, or a process ended, for example because a library crashed.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[Any, Any] = {}
    remaining = iter(tasks)
    os.environ["PYTHONHASHSEED"] = "0"  # for the workers: sets of strings have the same order in all of them
    try:
        with signals_blocked():
            for _, task in zip(range(processes), remaining, strict=False):
                worker_end: Any
                connection, worker_end = context.Pipe()
                workers[connection] = context.Process(
                    target=record_requested, args=(worker_end, recording), daemon=True
                )
                workers[connection].start()
                worker_end.close()
                connection.send(task)
        busy = set(workers)
        while busy:
            ready: list[Any] = multiprocessing.connection.wait(list(busy))
            for connection in ready:
                try:
                    result = connection.recv()
                except (EOFError, ConnectionError):
                    workers[connection].join()
                    code = workers[connection].exitcode
                    raise ConfigError(
                        f"env: a process that records {recording.env} ended with exit code {code}"
                    ) from None
                if isinstance(result, ConfigError):
                    raise result
                for task in remaining:
                    connection.send(task)
                    break
                else:
                    busy.remove(connection)
                yield result
    finally:
        for process in workers.values():
            if process.pid is not None:
                process.kill()
                process.join()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Delay signals until the block ends.

    Processes that are started inside never receive them: the program ends these.
    """
    multiprocessing.resource_tracker.ensure_running()  # starting it inside would unblock the signals
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------------------------------------- a recording


class Amount(NamedTuple):
    """The number of episodes of each split, and of the processes that record them."""

    episodes: dict[str, int]
    processes: int


def parse(argv: Sequence[str]) -> tuple[Recording, Amount, Path]:
    """Return the settings, the amount and the folder of a command line.

    Raises:
        ConfigError: a flag is unknown, missing, or has an invalid value.
    """
    given, _ = configuration.parse_flags(
        argv,
        "record.py --env ENV --episodes INT --datadir DIR",
        "Record episodes from an environment, for --dataset episodes.",
        keys=False,
        examples=[
            "python record.py --env dot --episodes 200 --steps 100 --datadir dots",
            "python record.py --env crafter --policy sticky --episodes 200 --datadir crafter",
        ],
        env=Flag("ENV", environments.NAMES),
        episodes=Flag("INT", "number of training episodes, in DATADIR/train"),
        test_episodes=Flag(
            "INT", "number of test episodes, in DATADIR/test (default: a tenth of --episodes, at least 1)"
        ),
        datadir=Flag("DIR", "folder for the files"),
        steps=Flag("INT", "maximum number of frames of an episode (default: the environment's own time limit)"),
        policy=Flag(
            "POLICY",
            f"random; sticky, which repeats its last action with probability {STICKY}; walk, to random places of a "
            "memory_maze; or module:function, which returns a policy (default: random)",
        ),
        seed=Flag("INT", "seed of environments and policies (default: 0)"),
        processes=Flag("INT", "number of parallel processes (default: one per CPU core)"),
    )
    for key in "env", "episodes", "datadir":
        if key not in given:
            raise ConfigError(f"command line: --{key} is missing; python record.py --help lists the flags")
    steps = whole_number(given, "steps", 2, 2) if "steps" in given else None
    recording = Recording(given["env"], given.get("policy", "random"), whole_number(given, "seed", 0, 0), steps)
    if recording.policy not in POLICIES and not all(recording.policy.partition(":")):
        raise ConfigError(f"policy: must be {', '.join(POLICIES)} or module:function, got {recording.policy!r}")
    train = whole_number(given, "episodes", 1, 1)
    episodes = {"train": train, "test": whole_number(given, "test_episodes", max(1, train // 10), 0)}
    return recording, Amount(episodes, whole_number(given, "processes", os.cpu_count() or 1, 1)), Path(given["datadir"])


def record(recording: Recording, amount: Amount, datadir: Path) -> None:
    """Record the episodes that are missing in a folder.

    Raises:
        ConfigError: the folder holds other files or another recording; or as `record_in_processes`.
    """
    datadir.mkdir(parents=True, exist_ok=True)
    with one_process(datadir / "recording.lock", f"recording to {datadir}"):
        check_folder(datadir, asdict(recording))
        paths = {
            (split, number): datadir / split / f"episode_{number:06}.npz"
            for split, count in amount.episodes.items()
            for number in range(count)
        }
        tasks = [task for task, path in paths.items() if not path.exists()]
        frames, start = 0, time.monotonic()
        with (
            contextlib.closing(record_in_processes(recording, tasks, min(amount.processes, len(tasks)))) as results,
            tqdm(
                total=len(paths),
                initial=len(paths) - len(tasks),
                unit="episode",
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 30,
            ) as bar,
        ):
            for split, number, content, count, packages in results:
                check_folder(datadir, asdict(recording) | {"packages": packages}, write=True)
                path = paths[split, number]
                path.parent.mkdir(exist_ok=True)
                replace_file(path, content)
                frames += count
                bar.set_postfix_str(f"{frames / (time.monotonic() - start):.3g} frames/s", refresh=False)
                bar.update()
    counts = ", ".join(f"{count:,} episodes in {split}" for split, count in amount.episodes.items())
    print(f"{datadir}: {counts}; {frames:,} new frames")


def check_folder(datadir: Path, settings: Mapping[str, Any], write: bool = False) -> None:
    """Compare the settings with those that a folder was recorded with; `write` them if there are none yet.

    Raises:
        ConfigError: they differ, or the folder holds other files.
    """
    path = datadir / "recording.json"
    if path.exists():
        try:
            recorded = json.loads(path.read_text())
            differing = [key for key in settings if recorded[key] != settings[key]]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"datadir: {path} is damaged; choose another folder") from None
        for key in differing:
            remedy = "install those versions" if key == "packages" else f"set --{key} to that"
            raise ConfigError(
                f"{key}: {datadir} was recorded with {json.dumps(recorded[key])}, got {json.dumps(settings[key])}; "
                f"{remedy}, or choose another --datadir"
            )
    elif any(datadir.glob("train/*")) or any(datadir.glob("test/*")):
        raise ConfigError(f"datadir: {datadir} holds other files in train or test; choose another folder")
    elif write:
        replace_file(path, json.dumps(settings, indent=1).encode())


def main() -> None:
    from system.interrupts import Interrupts, exit_codes  # loads JAX, which the recording processes don't need

    with exit_codes(), Interrupts():
        record(*parse(sys.argv[1:]))


if __name__ == "__main__":
    main()
