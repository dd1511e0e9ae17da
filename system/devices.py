"""All devices of this process and of the others: connect, place states and batches, exchange small things."""

import dataclasses
import json
import os
import re
import signal
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from config import Config, ConfigError
from system.interrupts import Interrupted


def connect(config: Config) -> Config:
    """Join the other processes of a cluster: those that the configuration names, or that the environment announces.

    Returns:
        The configuration without the keys that name them, which are this start's and not the run's.

    Raises:
        ConfigError: the keys can't work, the environment says too little, or the coordinator can't be reached.
    """
    c = config
    keys = c.coordinator_address, c.num_processes, c.process_id
    several = announced()
    if jax.distributed.is_initialized():  # by this program's training before: stages and grids have several
        return dataclasses.replace(c, coordinator_address=None, num_processes=None, process_id=None)
    if c.coordinator_address is not None and c.num_processes is not None and c.process_id is not None:
        if not re.fullmatch(r".+:\d{1,5}", c.coordinator_address):
            raise ConfigError(f"coordinator_address: must be host:port, got {c.coordinator_address!r}")
        if c.process_id >= c.num_processes:
            raise ConfigError(f"process_id: must be less than num_processes = {c.num_processes}, got {c.process_id}")
        # By itself, JAX would ask mpi4py for the rank on a machine with Open MPI from 5 on, installed or not.
        rank = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "")
        local = [int(rank)] if rank.isdigit() and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None
        try:
            jax.distributed.initialize(*keys, local_device_ids=local)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"coordinator_address: can't reach {c.coordinator_address} ({reason})") from error
    elif any(key is not None for key in keys):
        raise ConfigError("coordinator_address, num_processes, process_id: set all three, or none")
    elif several:
        try:
            jax.distributed.initialize()
        except Exception as error:  # whatever JAX meets in the environment, or on the way to the coordinator
            lacking = [name for name in LAUNCHERS[several] if name not in os.environ]
            found = f"{several}={os.environ[several]}" + (f" without {', '.join(lacking)}" if lacking else "")
            raise ConfigError(
                f"the environment announces several processes ({found}), which can't be connected "
                f"({' '.join(str(error).split())}); set coordinator_address, num_processes and process_id, or unset "
                f"{several} to train in one process"
            ) from error
    if jax.process_count() > 1:
        # Links between CPUs are made at the first exchange, which fails where one process comes 30 s after another: now
        # that all are here they are made, for exchanges between processes and for those between all devices.
        multihost_utils.sync_global_devices("connected")
        jax.pmap(lambda x: jax.lax.psum(x, "data"), axis_name="data")(np.ones(jax.local_device_count()))
    return dataclasses.replace(c, coordinator_address=None, num_processes=None, process_id=None)


LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_MCA_orte_hnp_uri"),
    "SLURM_STEP_NUM_TASKS": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "TPU_WORKER_HOSTNAMES": ("TPU_WORKER_ID",),
}
"""What says how many processes Open MPI, SLURM or a TPU pod started, and what else JAX needs to connect them."""


def announced() -> str:
    """Return which variable of LAUNCHERS says that there are several processes, "" if none does.

    JAX's own detection may ask the network.
    """
    for name in LAUNCHERS:
        value = os.environ.get(name, "")
        if "," in value if name.startswith("TPU") else value not in ("", "0", "1"):
            return name
    return ""


def use_compilation_cache() -> None:
    """Keep compiled programs for the next start, in JAX_COMPILATION_CACHE_DIR or else below the home directory.

    If that can't be written, say so and keep no new ones.
    """
    # Damaged or full: the program is compiled, as without a cache, and JAX warns for each one.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named is not None and (not named or "://" in named):  # none, or remote
        return
    try:
        directory = Path(named) if named else Path.home() / ".cache" / "cwvae" / "jax"
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
    except (OSError, RuntimeError) as error:  # RuntimeError: no HOME, and a user without a name
        print(
            f"Compiled programs aren't kept ({getattr(error, 'strerror', None) or error}); "
            "JAX_COMPILATION_CACHE_DIR names a place for them"
        )
    else:
        if not named:
            jax.config.update("jax_compilation_cache_dir", str(directory))


class Devices:
    """Where states and batches go."""

    def __init__(self) -> None:
        # The mesh bears pmap's own axis name: with another one, each second call would compile again.
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self.local, self.total = mesh.size, jax.device_count()
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec("data"))
        self.process, self.processes = jax.process_index(), jax.process_count()

    def rows(self, batch_size: int) -> int:
        """Return `batch_size` rounded up to what the devices of all processes divide."""
        return -(-batch_size // self.total) * self.total

    def own(self, batch_size: int) -> slice:
        """Return the rows of a batch that are this process's."""
        count = self.rows(batch_size) // self.processes
        return slice(self.process * count, (self.process + 1) * count)

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to each device by way of the host; else it would share, and donate, the memory of its arrays."""
        return jax.device_put(jax.tree.map(np.array, tree), self.everywhere)

    def spread(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches on this process's devices, [devices, B / devices, ...], sent one ahead."""
        sent: deque[Any] = deque()
        for batch in batches:
            batch = jax.tree.map(lambda x: x.reshape(self.local, -1, *x.shape[1:]), batch)
            sent.append(jax.device_put(batch, self.split))
            if len(sent) > 1:
                yield sent.popleft()
        yield from sent

    def gather(self, tree: Any) -> Any:
        """Return the processes' arrays, one after the other along the last axis, on each host."""
        tree = jax.device_get(tree)
        if self.processes == 1:
            return tree
        stacked = multihost_utils.process_allgather(tree)  # [processes, ...]
        return jax.tree.map(lambda x: np.concatenate(list(np.asarray(x)), axis=-1), stacked)

    def put(self, rows: Any) -> Any:
        """Spread rows, whose number this process's devices divide, over them."""
        return jax.device_put(rows, self.split)

    def first_decides(self, decide: Callable[[], str]) -> str:
        """Return what `decide` returns on process 0; if that fails there, raise ConfigError on every process."""
        if self.processes == 1:
            return decide()
        failed, text = False, ""
        if self.process == 0:
            try:
                text = decide()
            except (ConfigError, OSError) as error:
                failed, text = True, str(error)
        message = np.zeros(2**16, np.uint8)
        encoded = json.dumps([failed, text]).encode()
        message[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        failed, text = json.loads(bytes(self.from_first(message)).rstrip(b"\0"))
        if failed:
            raise ConfigError(text)
        return text

    def say(self, text: str) -> None:
        """Print on process 0."""
        if self.process == 0:
            print(text)

    def check_preemption(self, step: int) -> None:
        """Raise Interrupted on all processes after the same step, once one of them has got SIGTERM."""
        if self.processes > 1 and multihost_utils.reached_preemption_sync_point(step):
            raise Interrupted(signal.SIGTERM)

    def wait(self) -> None:
        """Wait for all processes to get here."""
        if self.processes > 1:
            multihost_utils.sync_global_devices("wait")

    def from_first(self, tree: Any) -> Any:
        """Return process 0's arrays, on each host."""
        return tree if self.processes == 1 else jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))
