"""Adapters for many domains beside the linear layers of any model, in one mixed batch."""

import torch
from torch import nn

import domlora

model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
x, domain = torch.randn(6, 16), torch.tensor([0, 2, 1, 2, 0, -1])  # -1: a domain nobody trained, scored by the base

before = model(x)
domlora.attach_(model, num_domains=3, temperature=16, include=["0"], domain=None)
domlora.freeze_(model)
with domlora.routed(model, domain):
    assert torch.equal(model(x), before)  # a fresh adapter changes nothing
    loss = model(x).square().mean()
loss.backward()

moving = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
print("moving:", ", ".join(moving))
