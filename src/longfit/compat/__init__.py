"""Floor 0: every private name of torch, transformers and PEFT that longfit uses, one function each."""
