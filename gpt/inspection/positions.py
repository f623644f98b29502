"""What a model adds to, or turns by, the place of a token: the numbers of a heat map, and what they mean in plain words.

Shapes: T positions, D dimensions: of the residual stream, or for rotary of one head.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from gpt.errors import UserError
from gpt.model.config import GPTConfig
from gpt.model.positions import rotary_tables, sinusoidal_table

if TYPE_CHECKING:
    from rich.text import Text
    from torch import Tensor

MOST_POSITIONS = 4096  # beyond, the picture would be larger than any screen
MOST_DIMENSIONS = 8192
_THETA = 10000.0  # of the 2021 paper; used where no model says another
_COLOURS = "RdBu_r"  # blue below zero, white, red above: told apart by people who do not see red and green as two


@dataclass(frozen=True)
class Pair:
    """Two dimensions of a head that turn together."""

    name: str
    degrees: float
    """That it turns from one position to the next."""
    tokens: float
    """Of a full turn."""
    dots: list[tuple[float, float, float]]
    """Where the first positions lie on the unit circle, x and y, and how strongly to draw them."""


@dataclass(frozen=True)
class PositionMap:
    """How positions enter a model, as numbers and in words."""

    kind: Literal["learned", "sinusoidal", "rotary"]
    values: np.ndarray
    """(T, D) float32."""
    reach: float
    """The colours go from -reach to reach."""
    quantity: str
    """What the numbers are."""
    explanation: str
    pairs: list[Pair] = field(default_factory=list)
    """rotary: some of its pairs, from the fastest to the slowest."""


def check_size(length: int, d_model: int, kind: str) -> None:
    """Raises UserError for a map that cannot be drawn."""
    if length > MOST_POSITIONS:
        raise UserError(f"length={length}: at most {MOST_POSITIONS} positions are drawn")
    if d_model > MOST_DIMENSIONS:
        raise UserError(f"d_model={d_model}: at most {MOST_DIMENSIONS} dimensions are drawn")
    if kind == "rotary" and d_model % 2:
        raise UserError(f"d_model={d_model} must be even: rotary positions turn pairs of dimensions")


def sinusoidal_map(length: int, d_model: int) -> PositionMap:
    """The fixed table of sines and cosines."""
    slowest = 2 * math.pi * 10000 ** (2 * (-(-d_model // 2) - 1) / d_model)
    return PositionMap(
        "sinusoidal", sinusoidal_table(length, d_model).numpy(), 1.0, "added to the token's vector",
        "Each position has a fixed row of numbers, which is added to the vector of the token that stands there. Every two "
        "dimensions are the sine and the cosine of one wave. The first wave repeats after 6.3 tokens, the last after "
        f"{slowest:,.0f}. They work like the hands of a clock: fast waves (left) tell neighbours apart, slow ones (right) say "
        "roughly where in the text a token stands. Nothing is learned.",
    )  # fmt: skip


def learned_map(rows: Tensor, context_length: int) -> PositionMap:
    """A model's own table.

    Args:
        rows: (T, D) of its position embedding.
        context_length: how many rows the model has.
    """
    values = rows.detach().float().cpu().numpy()
    reach = float(np.quantile(np.abs(values), 0.99)) or 1.0
    return PositionMap(
        "learned", values, reach, "added to the token's vector",
        f"This model has learned a row of numbers for each of its {context_length:,} positions; the row is added to the vector of "
        "the token that stands there. Stripes that run down the picture are dimensions that change slowly with the position; "
        "rows that look like noise are positions that training has hardly touched. The few numbers beyond "
        f"±{reach:.2g} have the colour of the end of the scale. Behind its last position the model cannot read.",
    )  # fmt: skip


def rotary_map(length: int, rotary_dim: int, config: GPTConfig | None = None) -> PositionMap:
    """The cosines by which queries and keys are turned.

    Args:
        length: T.
        rotary_dim: D, dimensions of a head that are turned.
        config: of a model, for its base and its scaling.
    """
    theta, scaling = (config.rope_theta, config.llama3_scaling) if config else (_THETA, None)
    cos, sin = rotary_tables(max(2, length), rotary_dim, theta, scaling)
    cosines, angles = cos[:length].numpy(), np.arctan2(sin[1].numpy(), cos[1].numpy())  # of one step; the fastest pair turns one radian
    half = rotary_dim // 2
    pairs = [_pair(i, half, float(angles[i]), min(length, 24)) for i in sorted({0, half // 4, half // 2, half - 1})]
    stretched = "; low frequencies are stretched by Llama 3.1's rule, for a longer context" if scaling else ""
    return PositionMap(
        "rotary", cosines, 1.0, "cosine of the angle",
        "Nothing is added to the token's vector. Instead, in every attention head the query and the key are turned: dimension i "
        f"and dimension i + {half} are taken as the two coordinates of a point, and the point turns by a fixed angle with each "
        "position. How well a query fits a key then depends only on how far apart the two tokens stand, not on where in the text. "
        f"The base theta = {theta:,.0f} sets how slow the pairs become: the first turns {pairs[0].degrees:.3g}° a token, the last "
        f"{pairs[-1].degrees:.2g}°{stretched}. The picture shows the cosine of each angle; its right half repeats the left, since "
        "both dimensions of a pair share it.",
        pairs,
    )  # fmt: skip


def _pair(index: int, half: int, angle: float, dots: int) -> Pair:
    places = [(math.cos(angle * p), math.sin(angle * p), 1 - 0.8 * p / max(1, dots - 1)) for p in range(dots)]
    return Pair(f"dimensions {index} and {index + half}", math.degrees(angle), 2 * math.pi / angle, places)


def colours(found: PositionMap) -> np.ndarray:
    """(T, D, 3) uint8: red, green and blue of each number."""
    from matplotlib import colormaps

    return colormaps[_COLOURS]((found.values / found.reach + 1) / 2, bytes=True)[..., :3]


def picture(found: PositionMap) -> str:
    """The heat map as a data: address of a PNG with one pixel for each number."""
    from matplotlib.image import imsave

    target = io.BytesIO()
    imsave(target, colours(found), format="png", metadata={"Software": ""})
    return "data:image/png;base64," + base64.b64encode(target.getvalue()).decode()


def colour_bar() -> str:
    """The scale of colours from top to bottom, for CSS."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return ", ".join(to_hex(colormaps[_COLOURS](1 - i / 10)) for i in range(11))


def in_terminal(found: PositionMap, width: int, lines: int = 32) -> tuple[Text, str]:
    """The heat map in half blocks, two positions a line.

    Args:
        found: the map.
        width: characters that there are.
        lines: at most so many.

    Returns:
        The picture with its axes, and what it leaves out, if anything.
    """
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    down, across = -(-found.values.shape[0] // (2 * lines)), -(-found.values.shape[1] // max(1, width - 7))
    drawn = colours(found)[::down, ::across]
    text = Text()
    for line in range(0, len(drawn), 2):
        text.append(f"{line * down:>5} " if line % 8 == 0 else " " * 6)
        for column in range(drawn.shape[1]):
            upper = Color.from_rgb(*drawn[line, column].tolist())
            lower = Color.from_rgb(*drawn[line + 1, column].tolist()) if line + 1 < len(drawn) else None
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    last = str((drawn.shape[1] - 1) * across)
    text.append(" " * 6 + "0" + last.rjust(drawn.shape[1] - 1) + "\n" + " " * 6 + "dimension".center(drawn.shape[1]).rstrip())
    every = [f"every {n}th {of}" for n, of in ((down, "position"), (across, "dimension")) if n > 1]
    return text, " and ".join(every)
