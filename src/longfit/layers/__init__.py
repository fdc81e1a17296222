"""Floor 2: modules that hold quantised weights and the adapter layer that trains on top of them."""
