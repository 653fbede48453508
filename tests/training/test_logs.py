"""What a run tells: metrics.csv, event files, lines of progress."""

import csv
import struct
import sys
import time

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from fvjax.training import MetricsLog, Progress


def table(folder):
    """The rows of metrics.csv as text."""
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def events(path):
    """The events in one file: records of a length, its checksum, the data and theirs."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[12 + length + 4 :]
    return found


def scalars(path):
    """{(name, step): value} of one event file."""
    return {(v.tag, e.step): v.simple_value for e in events(path) for v in e.summary.value}


def test_rows_are_written_at_once_and_numbers_come_back_exactly(tmp_path):
    """Catches numbers that lose digits, and rows that wait in a buffer until the run ends."""
    values = [0.1, 1 / 3, np.float32(0.1), 1e-300, 5, float("nan"), 2.0**60, np.int64(3)]
    with MetricsLog(tmp_path) as log:
        for count, value in enumerate(values):
            log.write(count + 1, loss=value)
            assert len(table(tmp_path)) == count + 1
    found = table(tmp_path)
    assert [int(row["step"]) for row in found] == list(range(1, 9))
    np.testing.assert_array_equal([float(row["loss"]) for row in found], np.asarray(values, float))
    before = (tmp_path / "metrics.csv").read_bytes()
    with MetricsLog(tmp_path, step=8) as log:
        np.testing.assert_array_equal([row["loss"] for row in log.rows], np.asarray(values, float))
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_new_name_adds_a_column(tmp_path):
    """Catches a header that does not match the rows, in the run itself and in one that is resumed."""
    rows = [(1, {"loss": 1.0}), (2, {"loss": 0.5, "fid": 9.0}), (3, {"loss": 0.25}), (4, {"rate": 2.0, "loss": 0.125})]
    with MetricsLog(tmp_path) as log:
        for step, values in rows:
            log.write(step, **values)
    whole = (tmp_path / "metrics.csv").read_text()
    assert whole.split() == ["step,loss,fid,rate", "1,1.0,,", "2,0.5,9.0,", "3,0.25,,", "4,0.125,,2.0"]
    for last in range(4):
        with MetricsLog(tmp_path, step=last) as log:
            assert [row["step"] for row in log.rows] == list(range(1, last + 1))
            for step, values in rows[last:]:
                log.write(step, **values)
        assert (tmp_path / "metrics.csv").read_text() == whole


@pytest.mark.parametrize("cut", [1, 2, 3, 12, 19, 20, 21, 22])
def test_a_resumed_log_drops_later_rows_and_half_lines(tmp_path, cut):
    """Catches a row that a kill cut off and that is read as another: as step 3 instead of 30, for instance."""
    with MetricsLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.write(step, loss=step / 7)
    path = tmp_path / "metrics.csv"
    whole = path.read_bytes()
    assert whole.endswith(b"\n30,4.285714285714286\r\n")
    path.write_bytes(whole[:-cut])
    (tmp_path / ".metrics.csv.partial").write_text("step,lo")
    with MetricsLog(tmp_path, step=20) as log:
        assert [row["step"] for row in log.rows] == [10, 20]
        log.write(30, loss=30 / 7)
    assert path.read_bytes() == whole
    assert [child.name for child in tmp_path.iterdir() if "partial" in child.name] == []


def test_event_files_hold_the_scalars_and_hide_what_was_lost(tmp_path):
    """Catches scalars that never reach the file, two starts in one file, and steps that TensorBoard shows twice."""
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4)), (0, (1,))):  # killed after 3, resumed from 2; begun anew
        with MetricsLog(tmp_path, step=first) as log:
            for step in steps:
                log.write(step, loss=step / 10, rate=first)
    paths = sorted((tmp_path / "tensorboard").iterdir())  # the order in which TensorBoard reads them
    assert len(paths) == 3
    for path, first, steps in zip(paths, (0, 2, 0), ((1, 2, 3), (3, 4), (1,)), strict=True):
        expected = {("loss", s): np.float32(s / 10) for s in steps} | {("rate", s): float(first) for s in steps}
        assert scalars(path) == pytest.approx(expected)
        starts = [e.step for e in events(path) if e.session_log.status == SessionLog.START]
        assert starts == [first + 1]


def test_another_process_writes_nothing(tmp_path, monkeypatch, capsys):
    """Catches two writers of one file, and every line of progress once for each process."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsLog(tmp_path) as log:
        log.write(1, loss=1.0)
    progress = Progress("training", 10)
    progress.update(10, 0.5)
    progress.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_log_is_a_plain_line_now_and_then(monkeypatch, capsys):
    """Catches a rate that counts the steps before a resume, a wrong remaining time, and a line for every step."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("training", 1000, first=400)
    for done in range(410, 1001, 10):
        now[0] += 1  # 10 steps a second
        progress.update(done, 1 / done)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 500/1000, 10/s, 50 s left, loss 0.002"
    assert lines[-1] == "training: 1000/1000, 10/s, 0 s left, loss 0.001"
    assert len(lines) == 6
    Progress("training", 2).update(1)
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    """Catches a bar that begins at 0 after a resume, shows no loss, or stays when the loop is left."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress("training", 100, first=50)
    time.sleep(0.15)  # the bar draws itself ten times a second at most
    progress.update(75, 0.25)
    progress.close()
    shown = capsys.readouterr().err
    assert "75/100" in shown
    assert "loss 0.25" in shown
    assert "0/100 " not in shown.split("\r")[1].replace("50/100", "")
    assert shown.endswith("\r")
