"""How much is logged and shown: our loggers hang below transformers', so that its verbosity is ours too.

No transformers here: the `vlmoe` command reads this before it knows whether it needs it.
"""

import logging
import os
import sys
import warnings

HOST = "transformers"
# By how often -v is given: our level, transformers' level. It says much at INFO, every configuration for one.
LEVELS = (("warning", "warning"), ("info", "warning"), ("debug", "info"))
VERBOSITY = "TRANSFORMERS_VERBOSITY"  # what transformers reads when it is imported
# What huggingface_hub, transformers and datasets ask, and tqdm, whose bar the Trainer draws without asking.
HUB_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"
BAR_SWITCHES = (HUB_BARS, "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its switches


def follow_host() -> None:
    """Puts the package's logger below transformers': `transformers.logging.set_verbosity_info()` and its like, its
    handlers and `TRANSFORMERS_VERBOSITY` then hold for both.
    """
    logging.getLogger(__package__).parent = logging.getLogger(HOST)


def set_verbosity(num_verbose: int = 0, is_quiet: bool = False) -> None:
    """What `-v`, `-vv` and `-q` mean; with none of them, the environment's word stands.

    Raises:
        ValueError: for both at once.
    """
    if num_verbose and is_quiet:
        raise ValueError("-v and -q are given together; leave one of them out.")
    if not (num_verbose or is_quiet):
        return
    if is_quiet:
        warnings.simplefilter("ignore")
    own, host = ("error", "error") if is_quiet else LEVELS[min(num_verbose, len(LEVELS) - 1)]
    os.environ[VERBOSITY] = host
    for name, level in ((__package__, own), (HOST, host)):
        logging.getLogger(name).setLevel(level.upper())


def hide_bars(is_quiet: bool = False) -> None:
    """Switches every progress bar off where it was asked for, or where nobody watches: stderr is no terminal.

    To be called before tqdm is imported. An explicit `HF_HUB_DISABLE_PROGRESS_BARS=0` keeps the bars.
    """
    asked = os.environ.get(HUB_BARS)
    is_hidden = not sys.stderr.isatty() if asked is None else asked.upper() in TRUE
    if is_quiet or is_hidden:
        os.environ |= dict.fromkeys(BAR_SWITCHES, "1")
