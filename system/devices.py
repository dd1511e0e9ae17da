"""The devices of all processes: connect processes, put states and batches on devices, exchange small values."""

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
    """Connect to the other processes of a cluster, if there are any.

    The configuration names them, or else the environment of a launcher does.

    Returns:
        The configuration without the keys that name them. They belong to this start, not to the run.

    Raises:
        ConfigError: the keys can't work, the environment is incomplete, or the coordinator can't be reached.
    """
    c = config
    keys = c.coordinator_address, c.num_processes, c.process_id
    variable = launcher_variable()
    if jax.distributed.is_initialized():  # by an earlier training of this program: stages and grids train several times
        return dataclasses.replace(c, coordinator_address=None, num_processes=None, process_id=None)
    if c.coordinator_address is not None and c.num_processes is not None and c.process_id is not None:
        if not re.fullmatch(r".+:\d{1,5}", c.coordinator_address):
            raise ConfigError(f"coordinator_address: must be host:port, got {c.coordinator_address!r}")
        if c.process_id >= c.num_processes:
            raise ConfigError(f"process_id: must be less than num_processes = {c.num_processes}, got {c.process_id}")
        # With Open MPI 5 or later, JAX would ask mpi4py for the rank, even if mpi4py isn't installed.
        rank = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "")
        local = [int(rank)] if rank.isdigit() and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None
        try:
            jax.distributed.initialize(*keys, local_device_ids=local)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"coordinator_address: can't reach {c.coordinator_address} ({reason})") from error
    elif any(key is not None for key in keys):
        raise ConfigError("coordinator_address, num_processes, process_id: set all three, or none")
    elif variable:
        try:
            jax.distributed.initialize()
        except Exception as error:  # JAX raises all kinds for a bad environment or coordinator
            missing = [name for name in LAUNCHERS[variable] if name not in os.environ]
            found = f"{variable}={os.environ[variable]}" + (f" without {', '.join(missing)}" if missing else "")
            raise ConfigError(
                f"the environment names several processes ({found}), which can't be connected "
                f"({' '.join(str(error).split())}); set coordinator_address, num_processes and process_id, or unset "
                f"{variable} to train in one process"
            ) from error
    if jax.process_count() > 1:
        # The first exchange connects CPUs. It fails if a process comes 30 s after another one. Therefore all processes
        # meet here, and then make an exchange between processes and one between all devices.
        multihost_utils.sync_global_devices("connected")
        jax.pmap(lambda x: jax.lax.psum(x, "data"), axis_name="data")(np.ones(jax.local_device_count()))
    return dataclasses.replace(c, coordinator_address=None, num_processes=None, process_id=None)


LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_MCA_orte_hnp_uri"),
    "SLURM_STEP_NUM_TASKS": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "TPU_WORKER_HOSTNAMES": ("TPU_WORKER_ID",),
}
"""Variables with the number of processes that Open MPI, SLURM or a TPU pod started -> others that JAX needs to connect
them."""


def launcher_variable() -> str:
    """Return the variable of LAUNCHERS that names several processes, "" if there is none.

    JAX's own detection isn't used, because it may ask the network.
    """
    for name in LAUNCHERS:
        value = os.environ.get(name, "")
        if "," in value if name.startswith("TPU") else value not in ("", "0", "1"):
            return name
    return ""


def use_compilation_cache() -> None:
    """Keep compiled programs for the next start, in JAX_COMPILATION_CACHE_DIR or else in the home directory.

    If the directory can't be written, print a line and keep no new ones.
    """
    # With a damaged cache or a full disk, JAX compiles as without a cache, and would warn for each program.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named is not None and (not named or "://" in named):  # no cache, or a remote one
        return
    try:
        directory = Path(named) if named else Path.home() / ".cache" / "cwvae" / "jax"
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
    except (OSError, RuntimeError) as error:  # RuntimeError: no HOME, and a user without a name
        print(
            f"Compiled programs aren't kept ({getattr(error, 'strerror', None) or error}); "
            "set JAX_COMPILATION_CACHE_DIR to a directory for them"
        )
    else:
        if not named:
            jax.config.update("jax_compilation_cache_dir", str(directory))


class Devices:
    """The devices that hold states and batches."""

    def __init__(self) -> None:
        # The mesh has the axis name of pmap: with another name, every second call would compile again.
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self.local, self.total = mesh.size, jax.device_count()
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec("data"))
        self.process, self.processes = jax.process_index(), jax.process_count()

    def rows(self, batch_size: int) -> int:
        """Return `batch_size` rounded up to a multiple of the number of all devices."""
        return -(-batch_size // self.total) * self.total

    def own_rows(self, batch_size: int) -> slice:
        """Return the rows of a batch that belong to this process."""
        count = self.rows(batch_size) // self.processes
        return slice(self.process * count, (self.process + 1) * count)

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to each device.

        It is copied on the host first. Otherwise the copy would share the memory of the arrays, and donate it.
        """
        return jax.device_put(jax.tree.map(np.array, tree), self.everywhere)

    def spread(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches on this process's devices, [devices, B / devices, ...]. The next batch is sent ahead."""
        sent: deque[Any] = deque()
        for batch in batches:
            batch = jax.tree.map(lambda x: x.reshape(self.local, -1, *x.shape[1:]), batch)
            sent.append(jax.device_put(batch, self.split))
            if len(sent) > 1:
                yield sent.popleft()
        yield from sent

    def gather(self, tree: Any) -> Any:
        """Return the arrays of all processes, concatenated along the last axis, on each host."""
        tree = jax.device_get(tree)
        if self.processes == 1:
            return tree
        stacked = multihost_utils.process_allgather(tree)  # [processes, ...]
        return jax.tree.map(lambda x: np.concatenate(list(np.asarray(x)), axis=-1), stacked)

    def put(self, rows: Any) -> Any:
        """Spread rows over this process's devices. The number of rows is a multiple of theirs."""
        return jax.device_put(rows, self.split)

    def first_decides(self, decide: Callable[[], str]) -> str:
        """Return the result of `decide` on process 0.

        Raises:
            ConfigError: on every process, if `decide` raises one or an OSError on process 0.
        """
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
        failed, text = json.loads(bytes(self.broadcast(message)).rstrip(b"\0"))
        if failed:
            raise ConfigError(text)
        return text

    def say(self, text: str) -> None:
        """Print on process 0."""
        if self.process == 0:
            print(text)

    def check_preemption(self, step: int) -> None:
        """Raise Interrupted on all processes after the same step, once one of them has received SIGTERM."""
        if self.processes > 1 and multihost_utils.reached_preemption_sync_point(step):
            raise Interrupted(signal.SIGTERM)

    def wait(self) -> None:
        """Wait until all processes have made this call."""
        if self.processes > 1:
            multihost_utils.sync_global_devices("wait")

    def broadcast(self, tree: Any) -> Any:
        """Return the arrays of process 0, on each host."""
        return tree if self.processes == 1 else jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))
