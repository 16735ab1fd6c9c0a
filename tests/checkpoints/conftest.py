"""Small random models, and their tensors by the names of a checkpoint."""

import pytest
import torch

from bench.reference.weights import Models, original_layout
from tests.checkpoints.common import SMALL
from tests.weights import random_models


@pytest.fixture(scope="module")
def models() -> Models:
    return random_models(SMALL)


@pytest.fixture
def tensors(models: Models) -> dict[str, torch.Tensor]:
    return original_layout(models)
