import matplotlib
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")
torch.set_num_threads(1)
settings.register_profile("quiet", deadline=None, max_examples=50)
settings.load_profile("quiet")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
