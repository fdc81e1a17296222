"""Floor 1: fast twins of ``numerics`` with the same signatures and the same bits."""
