"""How far models get when the length of a task doubles as they learn it.

Source: Rae et al. 2016, section 4.3. Each model has the same time, and the
settings of the preset `sam`. It is tested at the longest length that it was
trained on, and at multiples of that length.
"""

import dataclasses
import json
import pathlib

from benchmarks import cases
from benchmarks import measure
from benchmarks import report

TASKS = "associative-recall", "copy"
# The preset of each model.
MODELS = {"sam": "sam", "lstm": "lstm", "ntm": "default", "dnc": "dnc"}
SEEDS = 1, 2, 3
FACTORS = 2, 5, 10  # lengths of tests, times the longest of the training
TESTED = 8  # sequences of a test
HEADER = (
    *("task", "model", "seed", "steps", "minutes"),
    *("length learned", "last length", "wrong bits at the last length"),
    *(f"at {factor} times" for factor in FACTORS),
)


def run(tasks, models, seeds, minutes, threads, folder, path):
    """Trains, prints a table, and returns all numbers.

    Args:
        tasks, models, seeds: what to train: for each seed all tasks, for each
            task all models.
        minutes: time of each training.
        threads: number of threads of each process.
        folder: folder for the run folders of the trainings.
        path: path of the JSON file of all numbers, or None. Finished trainings
            in it are not repeated.
    """
    results = {}
    if path is not None and pathlib.Path(path).exists():
        results = json.loads(pathlib.Path(path).read_text())["results"]
    machine = report.machine()
    table = report.Table(HEADER)
    for seed in seeds:
        for task in tasks:
            for model in models:
                name = f"{task}-{model}-{seed}"
                if "steps" not in results.get(name, {}):
                    results[name] = measure.alone(
                        train,
                        *(task, model, seed, minutes, threads),
                        str(pathlib.Path(folder) / name),
                    )
                    report.write_json(
                        path, {"machine": machine, "results": results}
                    )
                table.add([_row(name, results[name])])
    table.end()
    print(f"{report.on(machine)}.")
    return results


def train(task, model, seed, minutes, threads, folder):
    """Trains and tests one model; returns a dict of numbers."""
    cases.prepare(threads)

    from keras_memory import training
    from keras_memory.training import losses
    from keras_memory.training import runs
    from keras_memory.training.presets import PRESETS

    config = dataclasses.replace(
        PRESETS[task]["sam"],
        model=PRESETS[task][MODELS[model]].model,
        seed=seed,
        minutes=minutes,
        picture_every=0,
        test_sequences=TESTED,
    )
    results = training.train(config, folder, show=lambda line: None)
    longest = results["longest_trained"]
    history = runs.read_history(folder, config)
    error = losses.KINDS[config.task.kind].error
    numbers = {
        "task": task,
        "model": model,
        "seed": seed,
        "parameters": results["parameters"],
        "steps": results["steps"],
        "minutes": results["seconds"] / 60,
        # The longest length after which the curriculum went on.
        "learned": max(
            (row["longest"] for row in history if row["longest"] < longest),
            default=0,
        ),
        "longest": longest,
        "error": results[f"{error}_at_{longest}"],
        "bits": results[f"bits_in_a_sequence_at_{longest}"],
        "errors": {},
    }
    trained = runs.load(pathlib.Path(folder) / "model.keras")
    for factor in FACTORS:
        length = factor * longest
        tested = runs.evaluate(
            trained, config.task, seed, sequences=TESTED, length=length
        )
        numbers["errors"][str(factor)] = {
            "length": length,
            "error": tested[f"{error}_at_{length}"],
            "bits": tested[f"bits_in_a_sequence_at_{length}"],
        }
    return numbers


def _row(name, result):
    if "not_run" in result:
        cells = [name, f"not run: {result['not_run']}"]
        return cells + [""] * (len(HEADER) - 2)
    tests = [result, *result["errors"].values()]
    return [
        *(result[key] for key in ("task", "model", "seed")),
        f"{result['steps']:,}",
        report.short(result["minutes"]),
        *(result[key] for key in ("learned", "longest")),
        *(
            f"{report.short(test['error'])} of {test['bits']:,.0f}"
            for test in tests
        ),
    ]
