"""What the tests of faults run in processes of their own: `child.py forever|until|full|process <arguments>`.

Nothing here is compiled, so that a process starts quickly.
"""

import errno
import json
import os
import resource
import shutil
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fvjax.checkpoints import CheckpointError, Checkpoints, ConfigMismatchError, stop_on_sigterm
from fvjax.training import TrainState

CONFIG = {"seed": 0}
ROOM = 300_000


def state_at(step, size=50_000):
    """A state that is a function of the step: 4 arrays of `size` numbers, in two dtypes, and more."""
    rng = np.random.default_rng(step)
    params, ema, mean, square = ({"w": rng.random(size, np.float32)} for _ in range(4))
    params["half"] = params["w"].astype(jnp.bfloat16)
    key = jax.random.wrap_key_data(np.array([0, step], np.uint32))
    return TrainState(np.asarray(step, np.int32), params, (np.int32(step), mean, square), ema, key)


def same(a, b):
    """Whether two states have the same bits."""

    def data(tree):
        tree = tree._replace(key=jax.random.key_data(tree.key))
        return [(str(np.asarray(leaf).dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]

    return jax.tree.structure(a) == jax.tree.structure(b) and data(a) == data(b)


def names(folder):
    """What lies in the folder, but for the lock."""
    return sorted(path.name for path in Path(folder).iterdir() if path.name != ".lock")


def say(line):
    """Tells the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def forever(folder):
    """Waits for a line, then resumes and saves step after step; says which ones are complete."""
    sys.stdin.readline()
    with Checkpoints(folder, config=CONFIG, keep_last=2) as checkpoints:
        last = checkpoints.restore(state_at(0))
        step = 0 if last is None else int(last.step)
        while True:
            step += 1
            checkpoints.save(state_at(step))
            say(step)  # its write has begun, so the one before it is complete


def until(folder):
    """Saves step after step until SIGTERM; prints the last step when it has come."""
    step = 0
    with stop_on_sigterm() as stop, Checkpoints(folder, config=CONFIG, keep_last=1) as checkpoints:
        while not stop():
            step += 1
            checkpoints.save(state_at(step))
            if step == 1:
                say("ready")
    say(step)


def full(folder, kind):
    """Fills the disk after two checkpoints, saves, makes room, saves again; prints what happened.

    "disk": a file takes the space that is left. "inodes": files take the number that is left. "file size": no file
    may grow beyond 100 kB, so that writing fails with EFBIG; the signal that goes with it is ignored by Python.
    """
    report = {}
    ballast = Path(folder) / "ballast"
    ballast.mkdir()
    with Checkpoints(folder, config=CONFIG, keep_last=10) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state_at(step))
        checkpoints.wait()
        if kind == "disk":
            fill(ballast / "file")
        elif kind == "inodes":
            use_up_inodes(ballast)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        checkpoints.save(state_at(3))
        try:
            checkpoints.save(state_at(4))
        except CheckpointError as error:
            report["error"] = str(error)
        report["after"] = [name for name in names(folder) if name != ballast.name]
        report["good"] = same(checkpoints.restore(state_at(0)), state_at(2))
        checkpoints.wait()  # says nothing: the failure was reported
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        shutil.rmtree(ballast)
        checkpoints.save(state_at(3))
        report["later"] = same(checkpoints.restore(state_at(0)), state_at(3))
    say(json.dumps(report))


def fill(path):
    """Writes until the disk is full, then leaves room for the first files of a checkpoint, not for its arrays."""
    with path.open("wb", buffering=0) as stream:
        for size in (100_000, 1000, 1):
            try:
                while True:
                    stream.write(b"x" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        stream.truncate(stream.tell() - ROOM)


def use_up_inodes(folder, spare=12):
    """Makes files until all but a few are used: bytes are free, and the write fails half-way."""
    for number in range(os.statvfs(folder).f_favail - spare):
        (folder / str(number)).touch()


def process(folder, index, port):
    """One of two processes: saves, restores past a damaged checkpoint, is refused; prints what it saw."""
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def on_all(step):
        state = state_at(step)
        one = jax.make_array_from_callback(state.params["w"].shape, everywhere, lambda i: state.params["w"][i])
        return state._replace(params={"w": one})

    report = {"processes": jax.process_count()}
    with Checkpoints(folder, config=CONFIG) as checkpoints:
        report["first"] = checkpoints.restore(on_all(0)) is None
        for step in (1, 2):
            checkpoints.save(on_all(step))
        state = checkpoints.restore(on_all(0))
        report["second"] = same(state, on_all(2)) and state.params["w"].sharding == everywhere
        if index == "0":
            damage = Path(folder) / "step_000000002" / "index.json"
            damage.write_bytes(b"")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report["third"] = same(checkpoints.restore(on_all(0)), on_all(1))
        report["warned"] = [warning.category.__name__ for warning in caught]
        checkpoints.save(on_all(2))
        try:
            checkpoints.restore(on_all(0)._replace(params={}))
        except ValueError as error:
            report["mismatch"] = type(error).__name__
    try:
        Checkpoints(folder, config={"seed": 1})
    except ConfigMismatchError as error:
        report["refused"] = str(error).split("saved -> asked) ")[1]
    say(json.dumps(report))


if __name__ == "__main__":
    {"forever": forever, "until": until, "full": full, "process": process}[sys.argv[1]](*sys.argv[2:])
