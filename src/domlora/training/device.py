"""Where a run computes, and its random numbers there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from domlora.errors import ConfigError

__all__ = ["brought", "device_named", "random_state", "set_random_state"]


def brought(models: Sequence[nn.Module], name: str) -> tuple[torch.device, torch.device]:
    """Move models to a device, if one is named; where the first one was, and where it is now."""
    home = here = next(models[0].parameters()).device
    if name:
        here = device_named(name)
        for model in models:
            model.to(here)
    return home, here


def device_named(name: str) -> torch.device:
    """A device of this machine by torch's name for it.

    Raises:
        ConfigError: no such name, or not on this machine.

    Example:
        >>> device_named("cpu")
        device(type='cpu')
    """
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            "device must be one that torch finds on this machine",
            received=name,
            next_step="Leave it out to train where the model is, on the CPU",
        ) from error
    return found


def random_state(device: torch.device) -> dict[str, Tensor]:
    """What dropout and the like draw from next, on the CPU and on a GPU."""
    own = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"torch": torch.get_rng_state(), **own}


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on as when :func:`random_state` was called."""
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
