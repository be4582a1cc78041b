"""Steps of Sparse Access Memory over slots and over time steps, next to dense
memories and to pytorch-dnc."""

import functools
import pathlib
import sys

import numpy as np

from benchmarks import cases
from benchmarks import measure
from benchmarks import references
from benchmarks import report
from benchmarks import scaling

ROW = {  # what a row has, unless its case says otherwise
    "layer": "SAM",  # or "SDNC", "NTM", "DNC", or a reference, by its name
    "slots": 2**20,
    "steps": 40,
    "batch": 4,
    "size": 16,  # of inputs and outputs
    "width": 32,
    "units": 100,
    "top_k": 4,
    "arguments": {},  # further ones of the layer
    "full": False,  # whether the memory stays, and all slots are written
    "search": True,  # False: each head reads slots hashed from its key
    "train": True,  # False: loss and gradients only, no optimizer
}
SLOTS = {
    "1K": 2**10,
    "2K": 2**11,
    "4K": 2**12,
    "16K": 2**14,
    "64K": 2**16,
    "256K": 2**18,
    "1M": 2**20,
    "4M": 2**22,
}
REFERENCE = references.NAMES["sam"]
SPARSE = "SAM", "SDNC"
LINKED = references.NAMES["sdnc"]
GIGABYTES, SECONDS = 8.0, 120.0  # limits of a process
LONG = {"steps": 10_000}
FULL = {"full": True}
UNSEARCHED = {**FULL, "search": False}
PAPER = {"steps": 10, "batch": 8, "train": False}
# Each case: the variant that others are compared with, and groups of rows. The
# rows of a group take turns. Groups whose rows fill the memory have the largest
# first: where a new process exceeds the limit together with older ones, the
# older ones are ended. A variant that did not run is left out of later groups.
CASES = {
    "slots": ("1K", [{name: {"slots": n} for name, n in SLOTS.items()}]),
    "steps": (
        "T = 40",
        [
            {
                "T = 40": {},
                "T = 1,000": {"steps": 1000},
                "T = 10,000": LONG,
                'T = 10,000, recompute="sqrt"': {
                    **LONG,
                    "arguments": {"recompute": "sqrt"},
                },
            }
        ],
    ),
    "full": (
        "1K",
        [
            {
                name: {**UNSEARCHED, "slots": SLOTS[name]}
                for name in ("1M", "64K", "16K", "1K")
            }
        ],
    ),
    "searched": (
        "16K",
        [
            {
                name: {**FULL, "slots": SLOTS[name]}
                for name in ("1M", "64K", "16K")
            }
        ],
    ),
    "memories": (
        "SAM",
        [
            {
                layer: {"layer": layer, "slots": n}
                for layer in ("DNC", "NTM", REFERENCE, "SAM")
            }
            for n in SLOTS.values()
        ],
    ),
    # The sparse DNC, whose links are compared with those of a DNC.
    "links": (
        "SDNC",
        [
            {
                layer: {"layer": layer, "slots": slots}
                for layer in (*others, "SDNC")
            }
            for slots, others in (
                (SLOTS["2K"], ("DNC",)),
                (SLOTS["64K"], (LINKED, "SAM")),
            )
        ],
    ),
    "linked slots": (
        "1K",
        [
            {
                name: {"layer": "SDNC", "slots": SLOTS[name]}
                for name in ("1K", "16K", "64K", "1M")
            }
        ],
    ),
    "linked, full": (
        "1K",
        [
            {
                name: {**UNSEARCHED, "layer": "SDNC", "slots": SLOTS[name]}
                for name in ("1M", "64K", "16K", "1K")
            }
        ],
    ),
    "published": (
        "SAM",
        [
            {
                "NTM": {"layer": "NTM", "slots": 2**n, **PAPER},
                "SAM": PAPER,
            }
            for n in (14, 16, 17, 18, 19, 20)
        ],
    ),
}


def run(names, rounds, threads, limits, checkout=None, json=None):
    """Measures, prints a table of each case, and returns all numbers.

    Args:
        names: list of keys of `CASES`.
        rounds: number of measured steps.
        threads: number of threads of each process.
        limits: `gigabytes` and `seconds` of a `measure.Worker`.
        checkout: of pytorch-dnc, if there is one.
        json: path of a file for all numbers, if any.
    """
    numbers = {
        "machine": report.machine(report.PACKAGES + ("faiss-cpu",)),
        "threads": threads,
        "results": [],
    }
    settings = {"run": {"rounds": rounds, "limits": limits}}  # of a record
    for name in names:
        base, groups = CASES[name]
        table, failed, measured = report.Table(header(base)), set(), []
        for group in groups:
            rows = {
                variant: {**ROW, **row}
                for variant, row in group.items()
                if variant not in failed
            }
            if all(row in measured for row in rows.values()):
                break  # "published": only the row of SAM is left
            measured += rows.values()
            print(f"{name}: {', '.join(rows)} ...", file=sys.stderr, flush=True)
            earlier = numbers["results"]

            def write(results, of=(name, base, rows), earlier=earlier):
                records = [{**r, **settings} for r in compared(*of, results)]
                numbers["results"] = earlier + records
                report.write_json(json, numbers)

            jobs = {
                variant: job(row, threads, checkout)
                for variant, row in rows.items()
            }
            results = measure.compare(jobs, rounds, seen=write, **limits)
            write(results)
            failed |= {v for v, one in results.items() if "not_run" in one}
            table.add(list(map(cells, numbers["results"][len(earlier) :])))
        if name == "published":
            more = extrapolated(numbers["results"])
            more = [{**record, **settings} for record in more]
            numbers["results"] = numbers["results"] + more
            report.write_json(json, numbers)
            table.add(list(map(cells, more)))
        table.end()
    print(
        f"Batch {ROW['batch']} ({PAPER['batch']} where published), inputs of "
        f"{ROW['size']}, LSTM of {ROW['units']}, slots of {ROW['width']}, "
        f"{references.HEADS} read heads, of {ROW['top_k']} slots if sparse. "
        f"Medians of {report.counted(rounds, 'step')} in turn, each row in a "
        f"process of its own with {report.counted(threads, 'thread')}; ratios "
        f"with the middle half. A process ends at {limits['gigabytes']:g} GB "
        f"or {limits['seconds']:g} s.\n{report.on(numbers['machine'])}."
    )
    return numbers


def job(row, threads, checkout):
    """Arguments of a `measure.Worker`, or the reason why it cannot run."""
    for kind, name in (("sam", REFERENCE), ("sdnc", LINKED)):
        if row["layer"] == name:
            return references.job(kind, row, threads, checkout)
    return (
        functools.partial(cases.prepare, threads),
        functools.partial(ours, row),
    )


def ours(row):
    """Returns a function that takes a step of one of our layers."""
    import keras

    import keras_memory
    from keras_memory.addressing import sparse

    arguments = {**row["arguments"]}
    if row["layer"] in SPARSE:
        arguments |= {"top_k": row["top_k"], "stateful": row["full"]}
    if not row["search"]:
        # Each row has a process of its own, so this changes no other row.
        sparse.nearest = hashed_slots
    layer = getattr(keras_memory, f"{row['layer']}Layer")(
        row["size"],
        memory_slots=row["slots"],
        slot_size=row["width"],
        read_heads=references.HEADS,
        controller_units=row["units"],
        return_sequences=True,
        **arguments,
    )
    adam = keras.optimizers.Adam(1e-3, global_clipnorm=50.0)
    optimizer = adam if row["train"] else None
    if row["full"]:
        slots = row["batch"], row["slots"], row["width"]
        layer.build((row["batch"], None, row["size"]))
        layer.set_memory(np.random.default_rng(2).standard_normal(slots, "f"))
    shape = row["batch"], row["steps"], row["size"]
    x = np.random.default_rng(1).uniform(size=shape)
    loss = keras.losses.MeanSquaredError()
    return cases.training_step(layer, loss, optimizer, x, x)


def hashed_slots(memory, norms, last_access, queries, top_k):
    """Replaces `sparse.nearest`: slots (B, H, K) int32, hashed from the first K
    numbers of each query (B, H, W). It does not read the memory."""
    from keras import ops

    from keras_memory.addressing import sparse

    def hashed(memory, queries):
        numbers = ops.floor(ops.abs(queries[:, :, :top_k]) * 1e6)
        return ops.cast(numbers, "int32") % memory.shape[1]

    return sparse.chosen(hashed, memory, queries)


def compared(name, base, rows, results):
    """Records for the JSON, with ratios of times to those of the base."""
    records = []
    for variant, result in results.items():
        record = {"case": name, "variant": variant, **rows[variant], **result}
        compared_with = results.get(base, {"not_run": "not there yet"})
        both = result, compared_with
        if variant != base and not any(map(is_missing, both)):
            record["ratio_quartiles"] = measure.ratio(compared_with, result)
        records.append(record)
    return records


def is_missing(result):
    return "not_run" in result


def extrapolated(records):
    """A list with one record: the largest NTM that ran, its time scaled to the
    SAM's number of slots as if it were linear in N. It is empty if that NTM has
    so many slots, or none ran."""
    ran = [
        record
        for record in records
        if record["case"] == "published"
        and record["layer"] == "NTM"
        and not is_missing(record)
    ]
    last = max(ran, key=lambda record: record["slots"], default=ROW)
    if last["slots"] == ROW["slots"]:
        return []
    factor = ROW["slots"] / last["slots"]
    record = {
        key: last[key] for key in ("case", "layer", "steps", "batch", "train")
    }
    record["variant"] = f"NTM, extrapolated from N = {last['slots']:,}"
    record["slots"] = ROW["slots"]
    record["milliseconds"] = factor * last["milliseconds"]
    if "ratio_quartiles" in last:
        record["ratio_quartiles"] = [
            factor * x for x in last["ratio_quartiles"]
        ]
    return [record]


def header(base):
    return "variant", "N", "T", "ms", f"times as long as {base}", "memory, MB"


def cells(record):
    first = [record["variant"], f"{record['slots']:,}", f"{record['steps']:,}"]
    if is_missing(record):
        return [*first, f"not run: {record['not_run']}", "", ""]
    return [
        *first,
        report.short(record["milliseconds"]),
        report.with_spread(record.get("ratio_quartiles")),
        report.short(record.get("megabytes")),
    ]


def draw(numbers, folder):
    """Draws scaling-sam.png, time and memory over slots, from all numbers."""
    results = [
        {**one, "layer": "sam", "axis": "N", "value": one["slots"]}
        for one in numbers["results"]
        if one["case"] == "memories" and not is_missing(one)
    ]
    scaling.draw({"results": results}, pathlib.Path(folder))
