"""Measures training steps: each variant in a process of its own, in turn."""

import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import signal
import time

import numpy as np

WARM_UP = 2  # steps behind the first that are not measured


class Stopped(Exception):
    """Why a variant has no numbers."""


def memory(process="self"):
    """Megabytes of a process by name, such as VmRSS; none but on Linux."""
    try:
        with open(f"/proc/{process}/status") as file:
            lines = [line.split() for line in file]
    except OSError:
        return {}
    return {
        line[0].rstrip(":"): int(line[1]) / 1024
        for line in lines
        if line[-1] == "kB"
    }


def forget_peak():
    """Gives unused memory back; the peak is then that of what follows."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak(before):
    """Megabytes at the peak beyond those of `before`, without the pages of
    libraries' files, or None where that is not known."""
    now = memory()
    if "VmHWM" not in now or "RssAnon" not in before:
        return None
    return now["VmHWM"] - now["RssFile"] - before["RssAnon"]


def timed(step):
    """Milliseconds of a step: by the clock, and of all the CPUs' time. Its
    `before()`, if it has one, is called first, and is not timed."""
    before = getattr(step, "before", None)
    if before is not None:
        before()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return (
        1e3 * (time.perf_counter() - wall),
        1e3 * (time.process_time() - cpu),
    )


def end_with_parent():
    """Lets Linux kill this process when its parent has ended."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def serve(connection, prepare, make, rounds, seconds):
    """What a worker's process does."""
    try:
        prepare()
        connection.send(("prepared", None))
        before = memory()
        begun = time.perf_counter()
        step = make()
        if hasattr(step, "tell"):
            end_with_parent()  # even if it is halted
        timed(step)
        first = time.perf_counter() - begun
        for _ in range(WARM_UP):
            timed(step)
        forget_peak()
        times = [timed(step)]
        while len(times) < rounds and time.perf_counter() < begun + seconds / 2:
            times.append(timed(step))
        result = {"first_step_seconds": first, "megabytes": peak(before)}
        if hasattr(step, "tell"):
            result["told"] = step.tell()
        connection.send(("alone", (result, times)))
        while asked := connection.recv():
            if asked == "tell":
                connection.send(("told", step.tell()))
                continue
            timed(step)  # the others have left nothing of ours in the caches
            connection.send(("step", timed(step)))
    except (EOFError, KeyboardInterrupt):
        pass  # the parent has ended
    except Exception as error:
        text = f"{type(error).__name__}: {error}".replace("|", "/")
        connection.send(("error", " ".join(text.split())[:200]))


class Worker:
    """A process that makes training steps of one variant, when it is told to.

    It begins with a first step, some to warm up, and some on its own, of which
    the peak of the memory is taken.

    Args:
        prepare: function that imports what `make` needs, which is not timed.
        make: function that returns a function that makes one step. Both are
            pickled. A step may have `before()`, which is called before each
            and is not timed, and `tell()`, which is called behind the steps on
            its own, `told` in the result, and when `compare` is through; its
            process is halted while it is not in turn.
        rounds: how many steps it makes on its own; fewer, but one, once half
            of the seconds are over.
        seconds: the longest that it may take for all this, and then for one
            step; without `prepare`.
        gigabytes: the largest resident size.
        others: workers that end, the oldest first, as soon as they and this
            one are together larger than `gigabytes`.

    Raises:
        Stopped: a limit was reached, or there was an error.
    """

    def __init__(
        self,
        prepare,
        make,
        rounds=3,
        seconds=math.inf,
        gigabytes=math.inf,
        others=(),
    ):
        self.seconds, self.gigabytes = seconds, gigabytes
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve,
            args=(theirs, prepare, make, rounds, seconds),
            daemon=True,
        )
        self.process.start()
        theirs.close()
        self._receive(math.inf)
        self.result, self.alone = self._receive(seconds, list(others))
        self._signal("SIGSTOP")

    def step(self):
        """Milliseconds of one more step: by the clock, and of the CPUs."""
        return self._ask("step")

    def tell(self):
        """What its step tells; None if that has no `tell`."""
        return self._ask("tell") if "told" in self.result else None

    def _ask(self, what):
        self._signal("SIGCONT")
        try:
            self.connection.send(what)
        except OSError:
            raise Stopped("its process has ended") from None
        answer = self._receive(self.seconds)
        self._signal("SIGSTOP")
        return answer

    def _signal(self, name):
        """Halts or wakes what works in the background of a step that tells."""
        if "told" in self.result and hasattr(signal, name) and self.alive:
            os.kill(self.process.pid, getattr(signal, name))

    @property
    def size(self):
        """Gigabytes that are resident."""
        return memory(self.process.pid).get("VmRSS", 0.0) / 1024

    @property
    def alive(self):
        return self.process.is_alive()

    def end(self):
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _receive(self, seconds, others=()):
        deadline = time.monotonic() + seconds
        while not self.connection.poll(0.1):
            reason = ""
            sizes = [one.size for one in [self, *others]]
            while len(sizes) > 1 and sum(sizes) > self.gigabytes:
                others.pop(0).end()
                del sizes[1]
            if sizes[0] > self.gigabytes:
                reason = f"over {self.gigabytes:g} GB"
            elif time.monotonic() > deadline:
                reason = f"over {self.seconds:g} s"
            if reason:
                self.end()
                raise Stopped(reason)
        try:
            kind, answer = self.connection.recv()
        except EOFError:
            self.process.join()
            answer = f"its process ended with {self.process.exitcode}"
            raise Stopped(answer) from None
        if kind == "error":
            self.end()
            raise Stopped(answer)
        return answer


def compare(jobs, rounds, alone=3, seen=None, **limits):
    """Lets variants make steps in turn.

    Each round takes two steps of each, of which the second is measured, so
    that what else the machine does hits all of them alike. Where memory does
    not suffice for all at once, the steps are those that each made on its own
    (`in_turn` is then false).

    Args:
        jobs: dict from any key to `prepare` and `make` of a worker, or to a
            text that says why there is none.
        rounds: how many steps are measured.
        alone: how many each makes on its own before.
        seen: function of the results so far, called when there are more: at
            first a variant has the steps on its own.
        limits: `seconds` and `gigabytes` of a worker.

    Returns:
        Dict from the key to a dict: medians `milliseconds` and
        `cpu_milliseconds`, `first_step_seconds`, `megabytes` (None where not
        measured), `in_turn`, all `rounds` (wall, CPU), and where a step tells,
        `told` and `told_after`; or `not_run`, the reason.
    """
    workers, results = {}, {}

    def found(key, result):
        results[key] = result
        if seen is not None:
            seen({key: results[key] for key in jobs if key in results})

    try:
        for key, job in jobs.items():
            try:
                if isinstance(job, str):
                    raise Stopped(job)
                others = [one for one in workers.values() if one.alive]
                workers[key] = Worker(*job, alone, **limits, others=others)
            except Stopped as reason:
                found(key, {"not_run": str(reason)})
            else:
                found(key, _numbers(workers[key]))
        times = _turns(workers, rounds)
        for key, worker in workers.items():
            result = _numbers(worker, times and times[key])
            if times and "told" in worker.result:
                result["told_after"] = worker.tell()
            found(key, result)
    finally:
        for worker in workers.values():
            worker.end()
    return {key: results[key] for key in jobs}


def _numbers(worker, steps=None):
    """A result, of the steps in turn or, if there are none, on its own."""
    rounds = steps or worker.alone
    wall, cpu = np.median(rounds, axis=0)
    return {
        "milliseconds": float(wall),
        "cpu_milliseconds": float(cpu),
        **worker.result,
        "in_turn": bool(steps),
        "rounds": rounds,
    }


def _turns(workers, rounds):
    """Times of all rounds, by key; None if one is not there any more."""
    times = {key: [] for key in workers}
    try:
        for _ in range(rounds):
            for key, worker in workers.items():
                times[key].append(worker.step())
    except Stopped:
        return None
    return times


def ratio(result, other):
    """How many times as long the other's steps took: quartiles over the
    rounds, the median in the middle."""
    pairs = zip(result["rounds"], other["rounds"])
    ratios = [theirs[0] / own[0] for own, theirs in pairs]
    return np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
