"""kill -9 at any moment loses at most what came after the last complete checkpoint, and leaves no rubbish."""

import random
import signal
import time

from fvjax.checkpoints import Checkpoints

ROUNDS = 8


def kill_while_saving(process, chance):
    """Lets the child save 2 to 5 steps, then kills it at a random moment; returns the last step that it had begun."""
    process.stdin.write("go\n")
    process.stdin.flush()
    times = []
    for _ in range(chance.randint(2, 5)):
        begun = int(process.stdout.readline())
        times.append(time.monotonic())
    time.sleep(chance.uniform(0, times[-1] - times[-2]))
    process.kill()
    rest, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return max([begun, *map(int, rest.split())])


def test_kill_at_random_moments_loses_only_what_was_not_complete(tmp_path, start, child):
    """Catches a checkpoint that is visible before it is whole, a lock that outlives its holder, and leftovers.

    The child saves without a pause, so that almost every kill falls into a background write or a removal.
    """
    chance = random.Random(0)
    unfinished = last = 0
    for _ in range(ROUNDS):
        begun = kill_while_saving(start("forever", tmp_path), chance)
        unfinished += any(not name.startswith("step_") for name in child.names(tmp_path))
        with Checkpoints(tmp_path, config=child.CONFIG, keep_last=2) as checkpoints:
            steps = checkpoints.steps()
            assert child.names(tmp_path) == [f"step_{step:09d}" for step in steps]
            assert len(steps) <= 3
            found = checkpoints.restore(child.state_at(0))
        assert last <= begun - 1 <= int(found.step) <= begun  # a step begins when the one before it is complete
        assert child.same(found, child.state_at(int(found.step)))
        last = begun - 1
    assert unfinished >= ROUNDS // 4


def test_sigterm_in_the_write_lets_the_context_finish_it(tmp_path, start, child):
    """Catches an end of the interpreter that cuts off the thread that writes."""
    process = start("until", tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    with Checkpoints(tmp_path, config=child.CONFIG) as checkpoints:
        assert checkpoints.steps() == [int(rest)]
        assert child.same(checkpoints.restore(child.state_at(0)), child.state_at(int(rest)))
