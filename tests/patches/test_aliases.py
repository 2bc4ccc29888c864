"""Views that one layer has of another's parameter: found when the model is created."""

from __future__ import annotations

import torch
from torch import nn

from flashquant.patches.layers.aliases import aliases


class Mixer(nn.Module):
    """As Mamba's: a view of a child's weight, kept as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, groups=4)
        view = self.conv.weight.detach().view(4, 3)[1:]
        self.register_buffer("view", view, persistent=False)
        self.register_buffer("own", torch.zeros(4))


def test_a_view_is_found_with_its_window() -> None:
    model = Mixer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    ((tensor, target, view),) = aliases(model, names)

    assert tensor is model.view
    assert target == "conv.weight"
    assert torch.equal(view.into(torch.arange(12.0)), torch.arange(12.0).view(4, 3)[1:])


def test_parameters_of_the_cache_have_no_aliases() -> None:
    """Only parameters with a name are pushed."""
    assert list(aliases(Mixer(), {})) == []
