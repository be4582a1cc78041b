"""Training steps of other implementations, which run on PyTorch."""

import importlib.util
import sys


def set_threads(threads):
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(threads)


def step_of(kind, sizes, checkout):
    """A function that makes a training step, or a text: why there is none."""
    if not importlib.util.find_spec("torch"):
        return 'pip install -e ".[bench]"'
    if kind == "ntm":
        if not checkout:
            return "--pytorch-ntm CHECKOUT of loudinthecloud/pytorch-ntm"
        return lambda: pytorch_ntm(sizes, checkout)
    if not importlib.util.find_spec("dnc"):
        return 'pip install -e ".[bench]"'
    return lambda: pytorch_dnc(sizes)


def pytorch_ntm(sizes, checkout):
    """As its `train.py`: the input, then as many steps without one, of which
    the loss is taken."""
    import torch

    sys.path.insert(0, str(checkout))
    from ntm.aio import EncapsulatedNTM

    batch, bits, length = sizes["batch"], sizes["bits"], sizes["steps"] // 2
    net = EncapsulatedNTM(
        bits + 1, bits, sizes["units"], 1, 1, sizes["slots"], sizes["width"]
    )
    optimizer = torch.optim.RMSprop(
        net.parameters(), momentum=0.9, alpha=0.95, lr=1e-4
    )
    loss_of = torch.nn.BCELoss()
    x = torch.randint(0, 2, (length + 1, batch, bits + 1)).float()
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
    """As its `tasks/`: Adam, and gradients clipped to a norm of 50. It does
    not feed its reads back."""
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
