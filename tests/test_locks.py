"""A lock is held exactly as long as its process lives."""

import fcntl

import pytest
from lake_tools import start_python

from hear_distill.files import UserError
from hear_distill.locks import alone, is_locked

HOLD = """
import sys
from pathlib import Path
from hear_distill.locks import alone
with alone(Path(sys.argv[1]), "held"):
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_held_across_processes_until_its_holder_is_killed(tmp_path):
    lock = tmp_path / "new" / "lock"
    assert not is_locked(lock)
    holder = start_python(HOLD, lock)
    assert is_locked(lock)
    with pytest.raises(UserError, match="wait for it"), alone(lock, "wait for it"):
        pytest.fail("two processes hold one lock")
    holder.kill()
    holder.communicate()
    assert not is_locked(lock)
    with alone(lock, "held"):
        assert is_locked(lock)
    assert not is_locked(lock)


def test_lookers_do_not_take_each_other_for_the_holder(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    with lock.open() as other_looker:
        fcntl.flock(other_looker, fcntl.LOCK_SH)
        assert not is_locked(lock)
    with alone(lock, "taken by a look"):
        pass
