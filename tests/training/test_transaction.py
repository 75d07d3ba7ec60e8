import pytest
import torch

from sb3_trpo_ext.training.transaction import Atomic, Checkpoint


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_block_leaves_the_same_bits(error: type[BaseException]) -> None:
    tensor = torch.tensor([float("nan"), -0.0, 5e-324, float("inf")], dtype=torch.float64)
    bits = tensor.view(torch.int64).clone()
    with pytest.raises(error), Atomic(Checkpoint([tensor])):
        tensor.fill_(1.0)
        raise error
    assert torch.equal(tensor.view(torch.int64), bits)


def test_a_finished_block_keeps_its_changes() -> None:
    tensor = torch.zeros(2)
    with Atomic(Checkpoint([tensor])):
        tensor.fill_(1.0)
    assert torch.equal(tensor, torch.ones(2))
