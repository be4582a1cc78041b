"""Configurations of papers and reference implementations."""

import dataclasses

from keras_memory.training import tasks
from keras_memory.training.config import MODELS
from keras_memory.training.config import DNCConfig
from keras_memory.training.config import LSTMConfig
from keras_memory.training.config import NTMConfig
from keras_memory.training.config import SAMConfig
from keras_memory.training.config import SDNCConfig
from keras_memory.training.config import Training


def _presets():
    """Dict from task name to dict from preset name to `Training`."""
    # Graves et al. 2014, section 4.6: RMSProp as in Graves 2013, eqs. 38-41.
    # The batch size and the number of steps are ours.
    graves = {
        "optimizer": "rmsprop",
        "optimizer_options": {
            "rho": 0.95,
            "momentum": 0.9,
            "epsilon": 1e-4,
            "centered": True,
        },
        "learning_rate": 1e-4,
        "clipvalue": 10.0,
        "batch_size": 1,
        "steps": 500_000,
    }
    reference = {
        "optimizer": "rmsprop",
        "optimizer_options": {"rho": 0.95, "momentum": 0.9, "epsilon": 1e-8},
        "learning_rate": 1e-4,
        "clipvalue": 10.0,
        "batch_size": 1,
    }
    reports = {
        "report_every": 200,
        "checkpoint_every": 1_000,
        "picture_every": 1_000,
    }
    adam = {"learning_rate_decay": True, "clipnorm": 0.2}
    # Rae et al. 2016, section 4.3. The numbers are ours.
    doubling = {
        "learning_rate": 3e-3,
        "clipnorm": 1.0,
        "batch_size": 16,
        "curriculum_doubles": True,
        "curriculum_error": 1.0,
        "steps": 1_000_000,
        "minutes": 10.0,
        "report_every": 20,
        "picture_every": 0,
        "test_sequences": 32,
    }
    ntm = NTMConfig(initialization="pytorch-ntm")
    # The number of weights is within 1 % of the NTM's.
    dnc = DNCConfig(
        slot_size=20,
        read_heads=1,
        controller_units=100,
        initialization="pytorch-ntm",
    )

    def presets(task, default, paper=None, model=ntm, **common):
        start = Training(task, model, **common, **default)
        # For all tasks the LSTM's number of weights is within 2 % of the NTM's.
        made = {"default": start}
        made["lstm"] = dataclasses.replace(start, model=LSTMConfig(units=119))
        made["dnc"] = dataclasses.replace(
            start,
            model=dataclasses.replace(dnc, memory_slots=model.memory_slots),
        )
        for name, architecture in MODELS.items():
            if name != "ntm" and name not in made:  # "ntm" is the default
                made[name] = dataclasses.replace(start, model=architecture())
        if paper is not None:
            heads = paper.pop("heads", 1)
            model = NTMConfig(
                read_heads=heads,
                write_heads=heads,
                controller_layers=paper.pop("controller_layers", 1),
            )
            made["paper"] = Training(
                task, model, **common, **{**graves, **reports, **paper}
            )
        return made

    made = {
        "copy": presets(
            tasks.Copy(),
            {
                **adam,
                "batch_size": 4,
                "learning_rate": 5e-3,
                "steps": 6_000,
                "stop_error": 0.02,
            },
            paper={},
            test_lengths=(40, 80, 120),
            probe_lengths=(20, 80),
        ),
        "repeat-copy": presets(
            tasks.RepeatCopy(),
            {
                **reference,
                **reports,
                "learning_rate": 2e-4,
                "learning_rate_decay": True,
                "curriculum": (4, 7),
                "steps": 30_000,
            },
            paper={},
            test_lengths=(20,),
        ),
        "associative-recall": presets(
            tasks.AssociativeRecall(),
            {**reference, **reports, "steps": 30_000},
            paper={},
            test_lengths=(10, 15, 20),
        ),
        "chain": presets(
            tasks.Chain(),
            {
                **adam,
                "clipnorm": 1.0,
                "batch_size": 16,
                "learning_rate": 3e-3,
                "steps": 4_000,
            },
            test_lengths=(32,),
        ),
        "n-grams": presets(
            tasks.NGrams(),
            {
                **adam,
                "clipnorm": 1.0,
                "batch_size": 4,
                "learning_rate": 2e-3,
                "steps": 5_000,
            },
            paper={"learning_rate": 3e-5},
        ),
        "priority-sort": presets(
            tasks.PrioritySort(),
            {
                **reference,
                "batch_size": 4,
                "learning_rate": 3e-4,
                "steps": 8_000,
            },
            paper={
                "heads": 5,
                "controller_layers": 2,
                "learning_rate": 3e-5,
            },
        ),
        "adding": presets(
            tasks.Adding(),
            {
                **adam,
                "clipnorm": 1.0,
                "batch_size": 8,
                "learning_rate": 1e-3,
                "steps": 2_000,
            },
            model=dataclasses.replace(ntm, memory_slots=16),
            test_lengths=(1_000,),
        ),
        "argmax": presets(
            tasks.Argmax(),
            {
                **adam,
                "clipnorm": 1.0,
                "batch_size": 16,
                "learning_rate": 3e-3,
                "steps": 3_000,
            },
            model=dataclasses.replace(ntm, memory_slots=16),
        ),
    }
    # The defaults of pytorch-dnc's task scripts.
    pytorch_dnc = Training(
        tasks.Copy(bits=5, max_length=4),
        DNCConfig(
            memory_slots=16,
            slot_size=20,
            controller_layers=2,
            controller_clip=20.0,
        ),
        learning_rate=1e-4,
        optimizer_options={
            "beta_2": 0.98,
            "epsilon": 1e-9,
            "global_clipnorm": 50.0,
        },
        batch_size=100,
        steps=100_000,
    )
    made["copy"]["pytorch-dnc"] = pytorch_dnc
    for name, task, units in (
        ("adding", tasks.Adding(max_length=1000), 64),
        ("argmax", tasks.Argmax(max_length=4), 100),
    ):
        made[name]["pytorch-dnc"] = dataclasses.replace(
            pytorch_dnc,
            task=task,
            model=dataclasses.replace(
                pytorch_dnc.model, controller_units=units
            ),
            steps=2_000,
        )
    long = {"max_length": 4096, "buckets": 0}
    for task, start in (
        (tasks.Copy(**long), 8),
        (tasks.AssociativeRecall(**long), 3),
    ):
        for name, architecture in (("sam", SAMConfig), ("sdnc", SDNCConfig)):
            model = architecture(initialization="pytorch-ntm")
            made[task.name][name] = Training(
                task,
                model,
                curriculum=(start,),
                probe_lengths=(20,),
                **doubling,
            )
    # A query of `chain` asks for one item, which one head reads.
    for name in ("sam", "sdnc"):
        start = made["chain"][name]
        made["chain"][name] = dataclasses.replace(
            start, model=dataclasses.replace(start.model, read_heads=1)
        )
    for name, steps in (("copy", 50_000), ("repeat-copy", 250_000)):
        made[name]["pytorch-ntm"] = dataclasses.replace(
            made[name]["paper"],
            model=ntm,
            steps=steps,
            optimizer_options=reference["optimizer_options"],
        )
    return made


PRESETS = _presets()
