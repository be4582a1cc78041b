"""Training steps of other implementations, which run on PyTorch."""

import functools
import importlib.util
import sys
import types
from typing import NamedTuple

HEADS = 4  # read heads of a DNC or SAM


class Reference(NamedTuple):
    """Another implementation of one of our layers.

    Args:
        name: what tables call it.
        packages: packages that it needs.
        modules: modules to import before steps are timed.
        option: option of the command line for its checkout, if it needs one.
        repository, path: on GitHub, and a file of a checkout.
    """

    name: str
    packages: tuple
    modules: tuple
    option: str = ""
    repository: str = ""
    path: str = ""


REFERENCES = {
    "ntm": Reference(
        "pytorch-ntm",
        packages=("torch",),
        modules=("ntm.aio",),
        option="--pytorch-ntm",
        repository="loudinthecloud/pytorch-ntm",
        path="ntm/aio.py",
    ),
    "dnc": Reference("pytorch-dnc", ("torch", "dnc"), ("dnc",)),
    "sam": Reference(
        "pytorch-dnc's SAM",
        packages=("torch", "faiss"),
        modules=("dnc", "faiss"),
        option="--pytorch-dnc",
        repository="ixaxaar/pytorch-dnc",
        path="dnc/sparse_memory.py",
    ),
}
REFERENCES["sdnc"] = REFERENCES["sam"]._replace(
    name="pytorch-dnc's SDNC", path="dnc/sparse_temporal_memory.py"
)
NAMES = {kind: one.name for kind, one in REFERENCES.items()}


def job(kind, sizes, threads, checkout):
    """Arguments of a `measure.Worker`, or the reason why it cannot run."""
    reference, missing = REFERENCES[kind], []
    if not all(map(installed, reference.packages)):
        missing.append('`pip install -e ".[bench]"`')
    if not reference.option:
        checkout = None
    elif not checkout:
        missing.append(f"`{reference.option}` with a checkout")
    if missing:
        return f"needs {' and '.join(missing)}"
    step = {
        "ntm": pytorch_ntm,
        "dnc": pytorch_dnc,
        "sam": pytorch_dnc_sparse,
        "sdnc": functools.partial(pytorch_dnc_sparse, links=8),
    }
    return (
        functools.partial(prepare, threads, checkout, reference.modules),
        functools.partial(step[kind], sizes),
    )


def not_computed(kind, steps=None):
    """Names the work that our layer does and the reference does not."""
    if kind != "ntm":
        return "reads are not fed back"
    half = f"last {steps // 2} of {steps}" if steps else "second half of the"
    return f"loss of the {half} steps only"


def prepare(threads, checkout=None, modules=()):
    """Starts PyTorch with this number of threads, and imports modules, those of
    a checkout first."""
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(threads)
    torch.manual_seed(1)
    torch.zeros(2).requires_grad_().sum().backward()
    if checkout:
        sys.path.insert(0, str(checkout))
    for name in modules:
        importlib.import_module(name)
    if "faiss" in modules:
        sys.modules["faiss"].omp_set_num_threads(threads)


def installed(name):
    return importlib.util.find_spec(name) is not None


def pytorch_ntm(sizes):
    """A step like its `train.py`: the input, then equally many steps without
    input, which make the loss."""
    import torch
    from ntm.aio import EncapsulatedNTM

    batch, bits, length = sizes["batch"], sizes["bits"], sizes["steps"] // 2
    net = EncapsulatedNTM(
        bits + 1, bits, sizes["units"], 1, 1, sizes["slots"], sizes["width"]
    )
    optimizer = torch.optim.RMSprop(
        net.parameters(), momentum=0.9, alpha=0.95, lr=1e-4
    )
    loss_of = torch.nn.BCELoss()
    first = sizes["steps"] - length
    x = torch.randint(0, 2, (first, batch, bits + 1)).float()
    y = torch.randint(0, 2, (length, batch, bits)).float()

    def step():
        optimizer.zero_grad()
        net.init_sequence(batch)
        for now in x:
            net(now)
        output = torch.stack([net()[0] for _ in range(length)])
        loss = loss_of(output, y)
        loss.backward()
        for parameter in net.parameters():
            parameter.grad.data.clamp_(-10, 10)
        optimizer.step()
        return loss.item()

    return step


def pytorch_dnc(sizes):
    """A step of its DNC, which does not feed its reads back."""
    from dnc import DNC

    net = DNC(gpu_id=-1, **dnc_arguments(sizes))
    return adam_step(net, sizes)


def pytorch_dnc_sparse(sizes, links=None):
    """A step of its SAM, or of its SDNC with this number of links a slot (its
    `temporal_reads` makes twice as many), with an exact index. It does not feed
    its reads back."""
    import dnc
    from dnc.sparse_temporal_memory import SparseTemporalMemory

    # Its memory imports this module when a sequence begins.
    index = types.SimpleNamespace(FAISSIndex=ExactIndex)
    sys.modules["dnc.faiss_index"] = index
    # Its constructor first makes the memory of a DNC, with N x N numbers. So it
    # gets few slots, and then the memory of all slots.
    few = dnc_arguments({**sizes, "slots": 2})
    net, memory = dnc.SAM(**few), dnc.SparseMemory
    if links is not None:
        net = dnc.SDNC(**few)
        memory = functools.partial(
            SparseTemporalMemory, temporal_reads=links // 2
        )
    net.rnn_layer_memory_shared = memory(
        net.output_size,
        sizes["slots"],
        sizes["width"],
        independent_linears=net.independent_linears,
        read_heads=HEADS,
        sparse_reads=sizes["top_k"],
    )
    net.memories[0] = net.rnn_layer_memory_shared
    return adam_step(net, sizes, time_first=True)


def dnc_arguments(sizes):
    return {
        "input_size": sizes["size"],
        "hidden_size": sizes["units"],
        "rnn_type": "lstm",
        "num_layers": 1,
        "num_hidden_layers": 1,  # of the LSTM; its default is 2
        "nr_cells": sizes["slots"],
        "cell_size": sizes["width"],
        "read_heads": HEADS,
        "batch_first": True,
    }


def adam_step(net, sizes, time_first=False):
    """A step like pytorch-dnc's `tasks/`: Adam, and gradients clipped to a norm
    of 50. `time_first` says that outputs are (T, B, size)."""
    import torch

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x = torch.rand(sizes["batch"], sizes["steps"], sizes["size"])
    y = x.transpose(0, 1) if time_first else x

    def step():
        optimizer.zero_grad()
        output, _ = net(x, (None, None, None), reset_experience=True)
        loss = ((output - y) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 50)
        optimizer.step()
        return loss.item()

    return step


class ExactIndex:
    """Finds the nearest slots of one row of a batch, for pytorch-dnc's sparse
    memory. It compares a key with every slot.

    Args:
        cell_size: int, width of a slot.
        K: int, number of slots to find.
        options: those of an approximate index are ignored.
    """

    def __init__(self, cell_size, K, **options):
        import faiss

        self.index, self.top_k = faiss.IndexFlatL2(cell_size), K

    def reset(self):
        """Forgets all slots."""
        self.index.reset()

    def add(self, memory, last=None):
        """Adds the slots of a tensor (N, W), or the first `last` ones."""
        self.index.add(memory[:last].detach().numpy())

    def search(self, keys):
        """Squared distances and positions (R, K) for a tensor (R, W); a
        position is -1 if there are fewer than K slots."""
        import torch

        found = self.index.search(keys.detach().numpy(), self.top_k)
        return tuple(map(torch.from_numpy, found))
