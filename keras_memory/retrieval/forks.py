"""Forks of a process with memories on the host.

A fork lacks the other threads, such as those that build trees, and would wait
forever for locks that they hold. So the forking thread takes all locks.
"""

import os
import threading
import weakref

_owners = weakref.WeakSet()
_forking = threading.RLock()  # one thread at a time
_held = []


def register(owner):
    """Prepares an object for forks until it is collected.

    Args:
        owner: has `_before_fork()`, which takes its locks, and
            `_after_fork(is_child)`, which frees them.
    """
    _owners.add(owner)


def _before_fork():
    _forking.acquire()
    _held[:] = list(_owners)
    for owner in _held:
        owner._before_fork()


def _after_fork(is_child=False):
    for owner in _held:
        owner._after_fork(is_child)
    _held.clear()
    _forking.release()


def _after_fork_in_child():
    _after_fork(is_child=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork,
        after_in_child=_after_fork_in_child,
    )
