"""Packages that only the classifier needs, imported where they are used."""

from importlib import import_module
from typing import Any


def sklearn_module(name: str) -> Any:
    """A module of scikit-learn.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return import_module(f"sklearn.{name}")
    except ImportError as error:
        raise ValueError("vlmoe classify reports with scikit-learn: pip install 'vlmoe[classify]'.") from error


def new_figure(**kwargs: Any) -> Any:
    """An empty figure of matplotlib, without a screen.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("vlmoe classify draws with matplotlib: pip install 'vlmoe[classify]'.") from error
    return Figure(layout="constrained", **kwargs)
