"""Training steps of other implementations, which run on PyTorch."""

import functools
import importlib.util
import pathlib
import sys

NAMES = {"ntm": "pytorch-ntm", "dnc": "pytorch-dnc"}


def job(kind, sizes, threads, checkout):
    """Arguments of a `measure.Worker`, or the reason why it cannot run."""
    prepared = functools.partial(prepare, threads, checkout)
    if kind == "dnc":
        if not (installed("torch") and installed("dnc")):
            return 'needs `pip install -e ".[bench]"`'
        return prepared, functools.partial(pytorch_dnc, sizes)
    missing = [] if installed("torch") else ['`pip install -e ".[bench]"`']
    if not checkout:
        missing.append("`--pytorch-ntm` with a checkout")
    if missing:
        return f"needs {' and '.join(missing)}"
    return prepared, functools.partial(pytorch_ntm, sizes)


def not_computed(kind, steps=None):
    """Names the work that our layer does and the reference does not."""
    if kind == "dnc":
        return "reads are not fed back"
    half = f"last {steps // 2} of {steps}" if steps else "second half of the"
    return f"loss of the {half} steps only"


def is_pytorch_ntm(checkout):
    """Whether the folder is a checkout of loudinthecloud/pytorch-ntm."""
    return (pathlib.Path(checkout) / "ntm" / "aio.py").is_file()


def prepare(threads, checkout):
    """Imports and starts PyTorch with this number of threads."""
    import torch

    torch.set_num_threads(threads)
    torch.set_num_interop_threads(threads)
    torch.manual_seed(1)
    torch.zeros(2).requires_grad_().sum().backward()
    if checkout:
        sys.path.insert(0, str(checkout))
        import ntm.aio  # noqa: F401
    if installed("dnc"):
        import dnc  # noqa: F401


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
    """A step like its `tasks/`: Adam, and gradients clipped to a norm of 50. It
    does not feed its reads back."""
    import torch
    from dnc import DNC

    net = DNC(
        input_size=sizes["size"],
        hidden_size=sizes["units"],
        rnn_type="lstm",
        num_layers=1,
        num_hidden_layers=1,  # of the LSTM; its default is 2
        nr_cells=sizes["slots"],
        cell_size=sizes["width"],
        read_heads=4,
        batch_first=True,
        gpu_id=-1,
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x = torch.rand(sizes["batch"], sizes["steps"], sizes["size"])

    def step():
        optimizer.zero_grad()
        output, _ = net(x, (None, None, None), reset_experience=True)
        loss = ((output - x) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 50)
        optimizer.step()
        return loss.item()

    return step
