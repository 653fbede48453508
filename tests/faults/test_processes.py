"""Two processes: the first one writes, both restore the same, both are refused alike."""

import json
import socket

import pytest


@pytest.fixture
def port():
    """A free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_write_once_and_restore_the_same(tmp_path, start, port, child):
    """Catches two writers in one folder, processes that resume from different steps, and an error on one side only."""
    running = [start("process", tmp_path, index, port) for index in (0, 1)]
    reports = []
    for process in running:
        output, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        reports.append(json.loads(output.splitlines()[-1]))
    expected = {
        "processes": 2,
        "first": True,
        "second": True,
        "third": True,
        "mismatch": "StateMismatchError",
        "refused": "seed: 0 -> 1",
    }
    assert reports[0] == {**expected, "warned": ["DamagedCheckpointWarning"]}
    assert reports[1] == {**expected, "warned": []}
    assert child.names(tmp_path) == ["damaged_step_000000002", "step_000000001", "step_000000002"]
