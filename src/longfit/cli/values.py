"""Values of options that are not settings of a run, read as settings are."""

from longfit.errors import ConfigError


def read_tokens(flag: str, text: str) -> int:
    """Read a number of tokens such as ``16k``.

    Raises: ConfigError: it is not one.
    """
    from pydantic_core import PydanticCustomError

    from longfit.config.sections import parse_tokens

    try:
        return int(str(parse_tokens(text)))
    except PydanticCustomError as error:
        raise ConfigError(f"{flag} {text}: {error.message()}") from None


def read_bytes(flag: str, text: str) -> int:
    """Read a positive number of bytes such as ``24GiB``.

    Raises: ConfigError: it is not one.
    """
    from pydantic_core import PydanticCustomError

    from longfit.config.sections import parse_bytes

    try:
        found = int(str(parse_bytes(text)))
    except PydanticCustomError as error:
        raise ConfigError(f"{flag} {text}: {error.message()}") from None
    if found < 1:
        raise ConfigError(f"{flag} {text}: must be a positive number of bytes such as 24GiB")
    return found
