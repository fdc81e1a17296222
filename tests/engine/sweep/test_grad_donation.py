"""A gradient may be overwritten only by the node it was promised to, and only if it is the tensor that was promised."""

import torch

from longfit.engine.sweep.grad_donation import Receiver, donate, is_donated, receiver_of


class Ours(Receiver, torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        Ours.allowed = is_donated(ctx, grad)
        return grad


class Giver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.receiver = receiver_of(x)
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        gradient = grad.expand(5).clone()
        donate(ctx.receiver, gradient)
        return gradient


def test_handed_over_straight() -> None:
    Giver.apply(Ours.apply(torch.ones(5, requires_grad=True))).backward()
    assert Ours.allowed


def test_not_when_another_reads_the_output_too() -> None:
    y = Ours.apply(torch.ones(5, requires_grad=True))
    (Giver.apply(y) + (y * 2).sum()).backward()
    assert not Ours.allowed


def test_not_when_a_sum_stands_between() -> None:
    leaf = torch.ones(5, requires_grad=True)
    Giver.apply(Ours.apply(leaf) + leaf).backward()
    assert not Ours.allowed


def test_only_our_nodes_receive() -> None:
    x = torch.ones(5, requires_grad=True)
    assert receiver_of(x) is None
    assert receiver_of(x * 2) is None
    assert receiver_of(Ours.apply(x)) is not None
