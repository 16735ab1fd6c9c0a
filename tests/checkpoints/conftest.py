"""Small random models, and their tensors by the names of a checkpoint."""

import pytest
import torch

from bench.reference.weights import Models, original_layout, random_models
from tests.checkpoints.common import SMALL


@pytest.fixture(scope="module")
def models() -> Models:
    return random_models(SMALL)


@pytest.fixture
def tensors(models: Models) -> dict[str, torch.Tensor]:
    return original_layout(models)
