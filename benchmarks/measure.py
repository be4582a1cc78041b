"""Measures training steps: variants take turns, each in its own process."""

import contextlib
import ctypes
import gc
import math
import multiprocessing
import os
import signal
import time
from concurrent import futures

import numpy as np

WARM_UP = 2  # unmeasured steps after the first


class Stopped(Exception):
    """The reason why a variant has no numbers."""


def memory(process="self"):
    """Megabytes of a process by name, such as VmRSS; empty except on Linux."""
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
    """Frees unused memory and resets the peak."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak(before):
    """Megabytes at the peak above `before`, without the pages of library files;
    None if unknown."""
    now = memory()
    if "VmHWM" not in now or "RssAnon" not in before:
        return None
    return now["VmHWM"] - now["RssFile"] - before["RssAnon"]


def timed(step):
    """Milliseconds of a step: wall time, and the time of all CPUs. Its
    `before()`, if any, is called first and not timed."""
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
    """Makes Linux kill this process when its parent ends."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def serve(connection, prepare, make, rounds, seconds):
    """Runs in the process of a worker."""
    try:
        prepare()
        connection.send(("prepared", None))
        before = memory()
        begun = time.perf_counter()
        step = make()
        if hasattr(step, "tell"):
            end_with_parent()  # even while halted
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
            timed(step)  # the other variants have emptied the caches
            connection.send(("step", timed(step)))
    except (EOFError, KeyboardInterrupt):
        pass  # the parent has ended
    except Exception as error:
        text = f"{type(error).__name__}: {error}".replace("|", "/")
        connection.send(("error", " ".join(text.split())[:200]))


class Worker:
    """A process that runs training steps of one variant on demand.

    It starts with a first step, warm-up steps, and steps without other
    variants, during which the peak of the memory is measured.

    Args:
        prepare: function that imports the modules of `make`; not timed.
        make: function that returns a function for one step. Both are pickled.
            A step may have `before()`, which is called before each step and
            not timed. It may have `tell()`, which is called after the steps
            without other variants (`told` in the result) and at the end of
            `compare`; then its process is halted between its turns.
        rounds: number of steps without other variants. After half of
            `seconds` no further step starts, but there is at least one.
        seconds: time limit of all these steps, and later of each step,
            without `prepare`.
        gigabytes: limit of the resident size.
        others: workers that are ended, oldest first, while all workers
            together exceed `gigabytes`.

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
        """Milliseconds of one more step: wall time and CPU time."""
        return self._ask("step")

    def tell(self):
        """The result of the step's `tell()`; None without one."""
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
        """Halts or wakes the background work of a step that has `tell()`."""
        if "told" in self.result and hasattr(signal, name) and self.alive:
            os.kill(self.process.pid, getattr(signal, name))

    @property
    def size(self):
        """Resident size in gigabytes."""
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
    """Runs the steps of all variants in turn.

    Each round runs two steps of each variant and measures the second. So other
    load of the machine affects all variants alike. If memory does not suffice
    for all at once, the numbers are those of the steps without other variants
    (`in_turn` is then false).

    Args:
        jobs: dict from any key to `prepare` and `make` of a worker, or to a
            text that says why it cannot run.
        rounds: number of measured steps.
        alone: number of steps of each variant before, without the others.
        seen: function of the results so far, called whenever there are more.
            The first results of a variant are of its steps without others.
        limits: `seconds` and `gigabytes` of a worker.

    Returns:
        Dict from the key to a dict: medians `milliseconds` and
        `cpu_milliseconds`, `first_step_seconds`, `megabytes` (None where not
        measured), `in_turn`, all `rounds` (wall, CPU), and for steps with
        `tell()`, `told` and `told_after`; or `not_run`, the reason.
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
    """A result of the steps in turn or, without any, of those before."""
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
    """Times of all rounds, by key; None if a worker has ended."""
    times = {key: [] for key in workers}
    try:
        for _ in range(rounds):
            for key, worker in workers.items():
                times[key].append(worker.step())
    except Stopped:
        return None
    return times


def ratio(result, other):
    """The speedup over the other variant: the quartiles over the rounds, with
    the median in the middle."""
    pairs = zip(result["rounds"], other["rounds"])
    ratios = [theirs[0] / own[0] for own, theirs in pairs]
    return np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()


def alone(function, *arguments):
    """The result of a function run in a separate process, or its error."""
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except Exception as error:
            text = f"{type(error).__name__}: {error}".replace("|", "/")
            return {"not_run": " ".join(text.split())[:200]}
