"""Launch configurations that are shipped: accelerate's form, each with its command at the top."""

from pathlib import Path

FOLDER = Path(__file__).parent


def shipped_configs() -> dict[str, Path]:
    """The configurations by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
