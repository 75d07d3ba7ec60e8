import matplotlib
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")
torch.set_num_threads(1)
settings.register_profile("quiet", deadline=None, max_examples=50)
settings.load_profile("quiet")


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> None:
    torch.manual_seed(0)
    torch.distributions.Distribution.set_default_validate_args(True)  # torch.compile leaves it switched off
