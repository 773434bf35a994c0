"""The block that the tests of all layers share, in a module that another process can import."""

from __future__ import annotations

import torch
from torch import nn

from normswap.layers import (
    BatchRenorm2d,
    CrossIterationBatchNorm2d,
    FilterResponseNorm2d,
    FrozenBatchNorm2d,
)


class Block(nn.Module):
    """A convolution, a normaliser and a head."""

    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = norm
        self.head = nn.Conv2d(4, 2, 1)
        if isinstance(norm, CrossIterationBatchNorm2d) and norm.compensate:
            norm.attach(self.conv)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))))


NORMS = {
    "frn": lambda: FilterResponseNorm2d(4, learnable_eps=True),
    "brn": lambda: BatchRenorm2d(4, momentum=0.2),
    "brn with a schedule": lambda: BatchRenorm2d(4, momentum=0.2, warmup=1, r_ramp=2, d_ramp=2),
    "cbn": lambda: CrossIterationBatchNorm2d(4, window=3),
    "naive cbn": lambda: CrossIterationBatchNorm2d(4, window=3, compensate=False),
    "frozen": lambda: FrozenBatchNorm2d(4),
}


def block(name):
    torch.manual_seed(0)
    return Block(NORMS[name]())


def batches(count=4):
    torch.manual_seed(1)
    return [torch.randn(2, 3, 6, 6) for _ in range(count)]


def train_in_process(rank, rendezvous, results, names):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    gradients = {}
    for name in names:
        model = nn.parallel.DistributedDataParallel(block(name))
        for x in batches(3):
            # two forwards before one backward: a buffer changed in place must not matter
            loss = model(x + rank).square().mean() + model(x - rank).square().mean()
            model.zero_grad()
            loss.backward()
        gradients[name] = [p.grad for p in model.parameters()]
    torch.save(gradients, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()
