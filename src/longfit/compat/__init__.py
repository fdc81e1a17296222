"""Floor 0: every private name of torch, transformers and PEFT that longfit uses, one function each.

    torch.py, torch_distributed.py, transformers.py, peft.py, regular_expressions.py (of Python itself)

Each function says what it is for and what public way there is not. Each has a contract test in ``tests/compat`` that
fails with what breaks, when a library changes.
"""

TESTED = {"torch": "2.13.0", "transformers": "5.24.0", "peft": "0.21.2"}
"""Versions that every test runs with; ``constraints.txt`` pins the same."""
