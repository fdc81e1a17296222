"""Floor 5: will it fit? The memory of a run, from a model's configuration and the run's settings alone.

    gguf_header.py      the configuration in a GGUF file's header
    shapes.py           ModelShape: what of a configuration decides bytes
    settings.py         PlanSettings: what of a run decides bytes
    constant_bytes.py   what does not grow with the context: weights, adapters, gradients, optimiser state
    per_token_bytes.py  what does: layer inputs, keys and values, tiles, the loss
    devices.py          what several devices change, and what each sends
    components.py       one thing that takes memory
    memory.py           all of it, by component, phase and place
    measure.py          this machine's rates
    machines.py         accelerators by name, measured rates, seconds per step
    ladder.py           what to change when it does not fit, cheapest first
    plan.py             plan(): the public answer

Nothing here imports torch, so that ``longfit plan`` answers at once. The formulas follow the engine line by line; the
tests hold them against real models on fake tensors and a benchmark against measured runs.
"""
