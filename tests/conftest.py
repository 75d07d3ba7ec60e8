import json
from collections.abc import Callable, Iterator

import matplotlib
import pytest
import torch
from hypothesis import settings
from worker_processes import Ranks

matplotlib.use("Agg")
torch.set_num_threads(1)
settings.register_profile("quiet", deadline=None, max_examples=50)
settings.load_profile("quiet")


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> None:
    torch.manual_seed(0)
    torch.distributions.Distribution.set_default_validate_args(True)  # torch.compile leaves it switched off


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks()
    yield found
    found.close()


@pytest.fixture
def record_property(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """As pytest's, in plain Python: a NumPy number cannot travel between xdist's workers and ends the whole session."""

    def record(name: str, value: object) -> None:
        record_property(name, json.loads(json.dumps(value)))

    return record
