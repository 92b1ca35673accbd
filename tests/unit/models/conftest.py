"""Schemas and rows that the tests of models share."""

import pytest
import torch

from domlora.features.schema import Feature, Schema

SIZES = (9, 7, 5)


def make_schema(num_dense: int = 0) -> Schema:
    categorical = [Feature(f"c{i}", num_ids=size) for i, size in enumerate(SIZES)]
    numeric = [Feature(f"x{i}", "numeric") for i in range(num_dense)]
    return Schema((*categorical, *numeric), domains=("a", "b", "c", "d"))


def make_rows(num_rows: int, num_dense: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(0, size, (num_rows,), generator=g) for size in SIZES], dim=1)
    domain = torch.randint(-1, 3, (num_rows,), generator=g)  # unsorted, some unknown, the last domain never
    return ids, torch.randn(num_rows, num_dense, generator=g), domain


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def schema():
    return make_schema()


@pytest.fixture
def schema_with_dense():
    return make_schema(num_dense=2)


@pytest.fixture
def rows():
    return make_rows


@pytest.fixture
def stir():
    """Moves every parameter off its start, so that nothing is zero or one by design."""

    def stir_(model):
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
            if hasattr(model, "senet"):  # a bottleneck of one relu is dead for half of all starts
                for parameter in (*model.embedding.parameters(), *model.senet.parameters()):
                    parameter.abs_()
        return model

    return stir_
