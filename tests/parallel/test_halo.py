"""What travels between the processes of a sequence: pieces, and bytes on the wire against the formulas."""

from typing import Any

import pytest
import torch
from tests.parallel.forked import run_in_processes
from tests.tiny_models import VOCABULARY, tiny_model

from longfit.attention.hf_attention import attention_key
from longfit.attention.visibility import build_schedule, document_starts
from longfit.engine.sweep.install import enable_sweep
from longfit.parallel.halo import OwnedTokens, SentKeys, cut, find_parcels, find_pieces
from longfit.parallel.sequence import SequenceParallelLoss
from longfit.parallel.traffic import exact_bytes, shifted_bytes

LAYERS, HEADS, KV_HEADS, DIM, ELEMENT = 2, 8, 4, 8, 8


def test_a_balanced_cut_gives_each_process_a_piece_from_the_front_and_its_mirror_image() -> None:
    segments = cut(24, 3, balanced=True)
    assert [segment.owner for segment in segments] == [0, 1, 2, 2, 1, 0]
    assert segments[1] == OwnedTokens(4, 8, 1)
    work = [sum(s.end**2 - s.start**2 for s in segments if s.owner == owner) for owner in range(3)]
    assert len(set(work)) == 1
    assert [segment.owner for segment in cut(24, 3, balanced=False)] == [0, 1, 2]


def test_shifted_attention_sees_half_a_group_of_half_of_the_heads() -> None:
    schedule = build_schedule(8, document_starts(1, 64), group_size=16)
    pieces = find_pieces(schedule, cut(64, 2, balanced=False), num_kv_heads=4)
    assert pieces == [SentKeys(0, 1, slice(2, 4), 24, 32)]


def test_a_key_head_of_both_halves_travels_with_the_shifted_half() -> None:
    schedule = build_schedule(9, document_starts(1, 64), group_size=16)
    pieces = find_pieces(schedule, cut(64, 2, balanced=False), num_kv_heads=3)
    assert pieces == [SentKeys(0, 1, slice(1, 3), 24, 32)]


def test_a_document_that_begins_at_the_border_sees_nothing_across_it() -> None:
    positions = torch.cat([torch.arange(32), torch.arange(32)])[None]
    schedule = build_schedule(8, document_starts(1, 64, position_ids=positions))
    assert find_pieces(schedule, cut(64, 2, balanced=False), num_kv_heads=4) == []


def test_a_halo_may_reach_over_several_processes() -> None:
    schedule = build_schedule(2, document_starts(1, 64), sliding_window=40)
    pieces = find_pieces(schedule, cut(64, 4, balanced=False), num_kv_heads=1)
    assert [(p.source, p.target, p.low, p.high) for p in pieces if p.target == 3] == [
        (0, 3, 9, 16), (1, 3, 16, 32), (2, 3, 32, 48),
    ]  # fmt: skip


def sent(rank: int, num_tokens: int, group_size: int | None) -> int:
    model: Any = tiny_model("llama", num_heads=HEADS, num_kv_heads=KV_HEADS)
    model.set_attn_implementation(attention_key("exact" if group_size is None else "shifted", group_size))
    enable_sweep(model, tile=16)
    loss_of = SequenceParallelLoss(torch.distributed.group.WORLD, balanced=group_size is None)
    ids = torch.randint(VOCABULARY, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    loss_of(model, ids, num_items=num_tokens - 1).backward()
    return loss_of.traffic.taken()


@pytest.mark.parametrize("num_tokens", [64, 128])
def test_shifted_attention_sends_what_the_formula_says_whatever_the_context(num_tokens: int) -> None:
    """Two processes are both at an edge: one sends keys forward and again for backward, the other their gradients."""
    first, last = run_in_processes(sent, 2, num_tokens, 16)
    formula = shifted_bytes(
        num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, group_size=16, element_bytes=ELEMENT
    )
    assert first + last == formula
    assert first == 2 * last


@pytest.mark.parametrize("processes", [2, 4])
def test_exact_attention_sends_what_the_formula_says(processes: int) -> None:
    totals = run_in_processes(sent, processes, 64, None)
    sizes = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "element_bytes": ELEMENT}
    assert sum(totals) == processes * exact_bytes(num_tokens=64, num_devices=processes, **sizes)


def test_what_two_segments_of_a_process_see_is_sent_to_it_once() -> None:
    segments = cut(64, 2, balanced=True)  # of 16 tokens, owned by 0, 1, 1, 0
    schedule = build_schedule(2, document_starts(1, 64))
    parcels = find_parcels(find_pieces(schedule, segments, num_kv_heads=1), segments)
    ways = [(p.longest.source, segments[p.longest.target].owner, len(p.pieces)) for p in parcels]
    assert sorted(ways) == [(0, 0, 1), (0, 1, 2), (1, 0, 1), (1, 1, 1), (2, 0, 1)]
