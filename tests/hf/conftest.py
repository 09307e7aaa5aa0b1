"""The built-in model, loaded once."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkcache.demo import model_path
from tests.models import DEVICE


@pytest.fixture(scope="session")
def demo_model():
    model = (
        AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval().to(DEVICE)
    )
    return model, AutoTokenizer.from_pretrained(model_path())
