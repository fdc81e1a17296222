"""Elements in row-major order, whatever the strides."""

import pytest
import torch
from torch import Tensor

from longfit.optim.elements import put, take


def tensors() -> list[Tensor]:
    return [
        torch.arange(60.0),
        torch.arange(60.0).view(3, 4, 5),
        torch.arange(60.0).view(10, 6).t(),
        torch.arange(60.0).view(3, 4, 5).permute(2, 0, 1),
        torch.arange(240.0).view(8, 30)[::2, ::2],
        torch.arange(600.0)[::10],
        torch.arange(600.0).view(10, 60)[:, 3:9],
        torch.tensor(5.0),
    ]


@pytest.mark.parametrize("tensor", tensors(), ids=lambda t: f"{tuple(t.shape)}/{t.stride()}")
def test_take_and_put_follow_row_major_order(tensor: Tensor) -> None:
    flat = tensor.flatten().clone()
    for start, stop in ((0, flat.numel()), (0, 1), (7, 23), (flat.numel() - 1, flat.numel())):
        if stop > flat.numel():
            continue
        assert torch.equal(take(tensor, start, stop), flat[start:stop])
        assert take(tensor, start, stop).is_contiguous()
        put(tensor, start, stop, -flat[start:stop])
        expected = flat.clone()
        expected[start:stop] *= -1
        assert torch.equal(tensor.flatten(), expected)
        put(tensor, start, stop, flat[start:stop])


def test_taking_from_a_contiguous_tensor_copies_nothing() -> None:
    tensor = torch.arange(60.0).view(3, 20)
    assert take(tensor, 7, 9).data_ptr() == tensor.data_ptr() + 7 * 4
