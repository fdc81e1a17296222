"""The label of a token that is not trained on, by the convention of torch and transformers."""

IGNORED = -100
