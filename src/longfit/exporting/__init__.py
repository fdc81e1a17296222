"""Hand a trained model on: merged, as GGUF, as an adapter for a server; each with its drift measured."""
