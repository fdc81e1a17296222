"""The only configuration objects: `RunConfig` and its nine sections, read from defaults, YAML, overrides and flags.

    sections.py     the settings themselves: names, types, defaults, allowed values, meaning
    source.py       where settings come from: YAML with line numbers, ``section.key=value``, flags
    problems.py     how mistakes are told: what, got, allowed, do; an unknown key names the nearest known one
    run.py          RunConfig and load_config, which put the three together
    description.py  what a setting is, told from its own declaration

Later sources win: defaults < YAML file < ``section.key=value`` < command-line flags. All errors of a configuration are
reported at once. Below this floor there are no configs, only arguments. Not here: anything that needs a model or data;
what depends on them stays ``None`` until `RunConfig.resolve` and `RunConfig.resolve_steps` are told.
"""

from longfit.config.description import Description, describe
from longfit.config.run import Explained, RunConfig, load_config

__all__ = ["Description", "Explained", "RunConfig", "describe", "load_config"]
