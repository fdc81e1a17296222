"""A decoder layer differentiated over the sequence tile by tile: what it costs is a few hidden states a token."""
