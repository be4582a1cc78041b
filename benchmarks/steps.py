"""Compares the times of training steps with those of the references."""

import sys

from benchmarks import cases
from benchmarks import measure
from benchmarks import references
from benchmarks import report

HEADER = (
    "case",
    "variant",
    "threads",
    "ms",
    "CPU ms",
    "first step, s",
    "memory, MB",
    "times as fast",
    "goal",
)


def run(names, threads, rounds, checkout=None, json=None):
    """Measures, prints a table, and returns all numbers.

    Args:
        names: keys of `cases.CASES`.
        threads: list of numbers of threads; all take turns.
        rounds: number of measured steps.
        checkout: path of a checkout of pytorch-ntm, if any.
        json: path of a file for all numbers, if any.
    """
    numbers = {
        "machine": report.machine(),
        "threads": threads,
        "rounds": rounds,
        "results": [],
    }
    table, best = report.Table(HEADER), []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        before = numbers["results"]

        def write(results, name=name, before=before):
            numbers["results"] = before + [
                {"case": name, "variant": variant, "threads": count, **result}
                for (variant, count), result in results.items()
            ]
            report.write_json(json, numbers)

        results = measured(name, threads, rounds, checkout, write)
        write(results)
        table.add([row(name, key, results[key]) for key in results])
        if len(threads) > 1:
            best += best_row(name, results)
    table.end()
    if best:
        print(report.table(BEST_HEADER, best) + "\n")
    print(
        f"Medians of {report.counted(rounds, 'step')} in turn, each variant in "
        "a process of its own; ratios with the middle half of the rounds.\n"
        f"{report.on(numbers['machine'])}."
    )
    return numbers


def measured(name, threads, rounds, checkout, seen=None):
    """Results of a case by (variant, threads), with ratios and spread."""
    kind, sizes, _ = cases.CASES[name]
    jobs = {
        (variant, count): job
        for count in threads
        for variant, job in cases.jobs(kind, sizes, count, checkout).items()
    }
    results = measure.compare(jobs, rounds, seen=seen)
    for (_, count), result in results.items():
        reference = results[references.NAMES[kind], count]
        if "not_run" not in result and "not_run" not in reference:
            result["ratio_quartiles"] = measure.ratio(result, reference)
    return results


def row(name, key, result):
    kind, sizes, goal = cases.CASES[name]
    variant, threads = key
    if variant == references.NAMES[kind]:
        missing = references.not_computed(kind, sizes["steps"])
        shown = f"{variant} ({missing})"
    else:
        shown = variant
    if "not_run" in result:
        reason = f"not run: {result['not_run']}"
        return [name, shown, threads, reason, "", "", "", "", ""]
    return [
        name,
        shown,
        threads,
        report.short(result["milliseconds"]),
        report.short(result["cpu_milliseconds"]),
        report.short(result["first_step_seconds"]),
        report.short(result["megabytes"]),
        report.with_spread(result.get("ratio_quartiles")),
        goal if variant == "fast loop" else "",
    ]


BEST_HEADER = (
    "case, each at its best number of threads",
    "reference, ms",
    "fast loop, ms",
    "times as fast",
    "goal",
)


def best_row(name, results):
    """A row of the fastest reference and the fastest run of the fast loop;
    empty if one did not run."""
    kind, _, goal = cases.CASES[name]
    found = []
    for variant in (references.NAMES[kind], "fast loop"):
        times = {
            key: result["milliseconds"]
            for key, result in results.items()
            if key[0] == variant and "not_run" not in result
        }
        if not times:
            return []
        found.append(min(times, key=times.get))
    quartiles = measure.ratio(results[found[1]], results[found[0]])
    shown = [
        f"{report.short(results[key]['milliseconds'])} "
        f"({report.counted(key[1], 'thread')})"
        for key in found
    ]
    return [[name, *shown, report.with_spread(quartiles), goal]]
