"""A colour for each expert: 64 that stay apart for normal sight and for the two common kinds of colour blindness.

The first seven are Okabe and Ito's (2008). Each further one is the colour farthest from all before it, in CIELAB, the
least of three distances: as it is, and as protanopes and deuteranopes see it (Machado, Oliveira and Fernandes, 2009).
Among the eighth to the tenth the order is the eye's.
"""

from itertools import pairwise

_CODES = """
0072b2 e69f00 009e73 cc79a7 56b4e9 d55e00 f0e442 96001e 00ff96 002dc3 5a3c5a ffd2e1 3c78f0 ff005a 0f3c96 d2b45a
96d2a5 2d693c b41e00 3ca5ff d2d2ff c3f069 692d78 b43c87 3c4bc3 0f873c 3cb4c3 4bc378 96c3b4 005af0 0f69c3 96962d
783c4b 8787c3 2d4b1e 5ad22d a55a78 a578e1 ffd2c3 69f078 f07896 f0785a 963c96 a55a2d 4b785a 87d278 ffa596 8700a5
a50069 f0c34b a569a5 1ed2e1 0f4b3c 5a5a78 ff96d2 e15a78 c30fb4 0fa55a c34b0f 78a596 c33ce1 960000 4bb4ff b4c3ff
"""
COLOURS = tuple(f"#{code}" for code in _CODES.split())
NOBODY = "#d8dee4"  # of a token that no expert took
LIGHT, DARK = "#ffffff", "#000000"


def colour(expert: int) -> str:
    """An expert's colour; -1 is none. Beyond 64 colours come again, and the numbers beside them tell."""
    return NOBODY if expert < 0 else COLOURS[expert % len(COLOURS)]


def channels(code: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of "#rrggbb"."""
    red, green, blue = (int(code[place : place + 2], 16) for place in (1, 3, 5))
    return red, green, blue


def luminance(code: str) -> float:
    """The relative luminance of a colour, as WCAG 2 defines it."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in _shares(code)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _shares(code: str) -> list[float]:
    return [channel / 255 for channel in channels(code)]


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, 1 to 21 (WCAG 2)."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def ink(code: str) -> str:
    """What is read best on a colour: white or black."""
    return max((LIGHT, DARK), key=lambda text: contrast(text, code))


# A heat map's colours at shares of 0, 1, 2 and 4 times the even one.
STOPS = ((0.0, "#ffffff"), (0.25, "#dbe9f6"), (0.5, "#82b9dd"), (1.0, "#08306b"))


def shade(share: float, even: float) -> str:
    """The colour of a share in a heat map: white at 0, pale where it is even, dark at four times that."""
    height = min(share / even / 4, 1.0) if even else 0.0
    for (low, pale), (high, dark) in pairwise(STOPS):
        if height <= high:
            part = (height - low) / (high - low)
            pairs = zip(channels(pale), channels(dark), strict=True)
            return "#{:02x}{:02x}{:02x}".format(*(round(one + (other - one) * part) for one, other in pairs))
    raise AssertionError("the last stop is 1")
