"""The mask of a schedule as a whole, and random inputs: what attention is held against, and what it is given."""

import torch


def dense_mask(schedule) -> torch.Tensor:
    keys = torch.arange(schedule.num_tokens)
    heads = torch.tensor(schedule.head_bounds).diff()
    first = schedule.first_key.transpose(0, 1).repeat_interleave(heads, dim=1)[..., None]  # [B, H, T, 1]
    return (keys >= first) & (keys <= keys[:, None])


def random_tensors(heads: int, kv_heads: int, tokens: int, dtype=torch.float64, dim: int = 8):
    """q, k, v, grad_out as layers make them: views of [B, T, heads, D] memory."""
    made = [torch.randn(2, tokens, h, dim).to(dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads, heads)]
    return [x.requires_grad_() for x in made[:3]], made[3]
