"""Floor 8: one file per verb: parse, call one library function, print."""
