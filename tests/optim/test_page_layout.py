"""Every element has one place, fields do not overlap, and the bytes are what the documentation says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longfit.numerics.adamw import BLOCK_SIZE
from longfit.optim.page_layout import ALIGNMENT, PageLayout, StateFormat, format_of

FORMATS = [StateFormat(bits, master) for bits in (8, 32) for master in (True, False)] + [StateFormat(64, False)]
PAGE_BYTES = 65_536


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(0, 60_000), st.sampled_from(FORMATS)), max_size=12))
def test_every_element_has_exactly_one_place(sizes: list[tuple[int, StateFormat]]) -> None:
    layout = PageLayout(PAGE_BYTES)
    params = [(number, torch.empty(numel), form) for number, (numel, form) in enumerate(sizes)]
    layout.add(params[:5])
    layout.add(params[5:])
    covered: dict[int, int] = {number: 0 for number, _, _ in params}
    for page in layout.pages:
        frame = torch.zeros(PAGE_BYTES, dtype=torch.uint8)
        for run in page.runs:
            assert run.start == covered[run.param], "runs of a parameter follow each other"
            assert run.start % BLOCK_SIZE == 0
            covered[run.param] = run.stop
            for view in run.views(frame).values():
                assert (view.data_ptr() - frame.data_ptr()) % ALIGNMENT == 0
                as_bytes = view.view(torch.uint8)
                assert not as_bytes.any(), "two fields share a byte"
                as_bytes.fill_(1)
    assert list(covered.values()) == [numel for numel, _ in sizes]


@pytest.mark.parametrize("form", FORMATS)
def test_capacity_is_the_largest_that_fits(form: StateFormat) -> None:
    for room in (0, 100, 4096, 65_536, 1_000_000):
        numel = form.capacity(room)
        assert numel % BLOCK_SIZE == 0
        assert form.num_bytes(numel) <= room
        assert form.num_bytes(numel + BLOCK_SIZE) > room


def test_an_8_bit_state_takes_less_than_2_05_bytes_a_parameter() -> None:
    layout = PageLayout(4 << 20)
    layout.add([(0, torch.empty(50_000_000, device="meta"), StateFormat(8, master=False))])
    assert layout.state_bytes / 50_000_000 < 2.05
    assert len(layout.pages) * layout.page_bytes / 50_000_000 < 2.05 + layout.page_bytes / 50_000_000, "one open page"


def test_small_parameters_keep_32_bits_and_share_a_page() -> None:
    small, large = torch.empty(4095), torch.empty(4096)
    assert format_of(small, state_bits=8, master_weights="fp32").bits == 32
    assert format_of(large, state_bits=8, master_weights="fp32").bits == 8
    layout = PageLayout(PAGE_BYTES)
    layout.add([(n, torch.empty(64), StateFormat(32, False)) for n in range(50)])
    assert len(layout.pages) == 1


def test_masters_belong_to_16_bit_parameters() -> None:
    for dtype, master in (
        (torch.bfloat16, True),
        (torch.float16, True),
        (torch.float32, False),
        (torch.float64, False),
    ):
        assert format_of(torch.empty(9, dtype=dtype), state_bits=32, master_weights="fp32").master == master
    assert not format_of(torch.empty(9, dtype=torch.bfloat16), state_bits=32, master_weights="stochastic").master
    assert format_of(torch.empty(9000, dtype=torch.float64), state_bits=8, master_weights="fp32").bits == 64


def test_devices_do_not_share_a_page() -> None:
    layout = PageLayout(PAGE_BYTES)
    form = StateFormat(32, False)
    layout.add([(0, torch.empty(8), form), (1, torch.empty(8, device="meta"), form), (2, torch.empty(8), form)])
    assert [(page.device.type, [run.param for run in page.runs]) for page in layout.pages] == [
        ("cpu", [0, 2]),
        ("meta", [1]),
    ]


def test_the_fingerprint_tells_layouts_apart() -> None:
    def fingerprint(numel: int, form: StateFormat, page_bytes: int = PAGE_BYTES) -> str:
        layout = PageLayout(page_bytes)
        layout.add([(0, torch.empty(numel), form)])
        return layout.fingerprint()

    form = StateFormat(32, False)
    assert fingerprint(100, form) == fingerprint(100, form)
    others = [fingerprint(101, form), fingerprint(100, StateFormat(32, True)), fingerprint(100, form, 1 << 20)]
    assert len({fingerprint(100, form), *others}) == 4
