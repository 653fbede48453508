"""A full disk is one clear error; no half checkpoint is left, the older ones stay, and the run can go on."""

import errno
import json
import os
import shutil
import subprocess

import pytest

MOUNT = 'mount -t tmpfs -o size=8m,nr_inodes=200 tmpfs "$0" && exec "$@"'
IN_OWN_MOUNT = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT)


@pytest.fixture
def small_disk(tmp_path):
    """Runs what follows on a file system of 8 MB at `tmp_path`, in name spaces of its own: no privilege is needed."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    tried = subprocess.run([*IN_OWN_MOUNT, tmp_path, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no mount in a user name space: {tried.stderr.strip()}")
    return (*IN_OWN_MOUNT, str(tmp_path))


def check(process):
    """What must hold, whatever made the write fail."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    report = json.loads(output)
    assert "the checkpoint of step 3 could not be written in" in report["error"]
    assert "\n" not in report["error"]
    assert report["after"] == ["step_000000001", "step_000000002"]
    assert report["good"]
    assert report["later"]
    return report, errors


def test_a_full_disk_is_one_error_and_harms_no_older_checkpoint(tmp_path, start, small_disk):
    """Catches an error that is lost in the background, half a checkpoint that keeps the disk full, a dead writer."""
    report, errors = check(start("full", tmp_path, "disk", before=small_disk))
    assert f"{os.strerror(errno.ENOSPC)}: 0.9 MB needed, 0." in report["error"]
    assert errors == ""


def test_a_disk_that_is_full_in_the_middle_of_a_write_is_one_error(tmp_path, start, small_disk):
    """The same where free bytes do not tell, and orbax itself fails."""
    report, _ = check(start("full", tmp_path, "inodes", before=small_disk))
    assert os.strerror(errno.ENOSPC) in report["error"]


def test_a_file_that_may_not_grow_is_one_error_too(tmp_path, start):
    """The same where no file system can be mounted: a limit on the size of files, met by the arrays."""
    report, _ = check(start("full", tmp_path, "file size"))
    assert os.strerror(errno.EFBIG) in report["error"]
