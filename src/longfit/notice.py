"""What longfit says unasked, through ``logging``: shown on stderr unless the application has set logging up itself.

A library's INFO lines are hidden by default. These are few and each says what was chosen on the user's behalf, so they
are shown where nobody has configured logging; where somebody has, they go the ordinary way.
``logging.getLogger("longfit").setLevel(logging.WARNING)`` silences them.
"""

import logging
import os

from longfit.words import visible


def notify(message: str) -> None:
    """Say one line at level INFO; of several processes of a run the first says it for all."""
    logger, message = logging.getLogger("longfit"), visible(message)
    if os.environ.get("RANK", "0") != "0":
        return
    if logger.hasHandlers():
        logger.info(message)
    elif logger.level <= logging.INFO:  # NOTSET is 0
        handler = logging.StreamHandler()  # stderr as it is now
        handler.setFormatter(logging.Formatter("longfit: %(message)s"))
        handler.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, message, (), None))
