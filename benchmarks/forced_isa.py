"""``--isa avx2`` of a benchmark: holds longfit, torch, oneDNN and MKL to an instruction set, peers and all.

Import it before torch, which reads its variables when it is imported: ``from forced_isa import ISA, DTYPE, suffix``.
"""

import argparse
import os

from longfit.kernels.cpu import processor

_parser = argparse.ArgumentParser(add_help=False)
_parser.add_argument("--isa")
ISA: str | None = _parser.parse_known_args()[0].isa
"""What the command line names; None where the processor chooses."""

if ISA is not None:
    os.environ["LONGFIT_ISA"] = ISA
    processor.force()

DTYPE: str = processor.auto_dtype()[0]
"""What this instruction set multiplies fast, "bfloat16" or "float32": the dtype of longfit and of its peers."""


def suffix() -> str:
    """What a file of results is named beside its benchmark: nothing, or the instruction set that was forced."""
    return "" if ISA is None else f"_{ISA}"


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Tell a benchmark's parser of the option that was read here."""
    parser.add_argument("--isa", help="instruction set for longfit and its peers alike: scalar, avx2, avx512")
