"""A small pixel font for captions in pictures, so that rendering needs no font library."""

from __future__ import annotations

from functools import cache

import numpy as np

GLYPH_WIDTH, GLYPH_HEIGHT = 5, 8
"""Pixels of a glyph; the last row holds descenders."""
SCALE = 2
LINE_HEIGHT = GLYPH_HEIGHT * SCALE

# every glyph is five columns wide, one blank column between neighbours
_SHEETS = (
    (
        "ABCDEFGHIJKLM",
        """
 ###  ####   ###  ####  ##### #####  ###  #   # #####   ### #   # #     #   #
#   # #   # #   # #   # #     #     #   # #   #   #      #  #  #  #     ## ##
#   # #   # #     #   # #     #     #     #   #   #      #  # #   #     # # #
##### ####  #     #   # ####  ####  # ### #####   #      #  ##    #     # # #
#   # #   # #     #   # #     #     #   # #   #   #      #  # #   #     #   #
#   # #   # #   # #   # #     #     #   # #   #   #   #  #  #  #  #     #   #
#   # ####   ###  ####  ##### #      ###  #   # #####  ##   #   # ##### #   #

""",
    ),
    (
        "NOPQRSTUVWXYZ",
        """
#   #  ###  ####   ###  ####   #### ##### #   # #   # #   # #   # #   # #####
##  # #   # #   # #   # #   # #       #   #   # #   # #   # #   # #   #     #
# # # #   # #   # #   # #   # #       #   #   # #   # #   #  # #   # #     #
#  ## #   # ####  #   # ####   ###    #   #   # #   # # # #   #     #     #
#   # #   # #     # # # # #       #   #   #   # #   # # # #  # #    #    #
#   # #   # #     #  #  #  #      #   #   #   #  # #  ## ## #   #   #   #
#   #  ###  #      ## # #   # ####    #    ###    #   #   # #   #   #   #####

""",
    ),
    (
        "abcdefghijklm",
        """
      #               #         ##        #       #      #  #      ##
      #               #        #  #       #                 #       #
 ###  ####   ###   ####  ###   #     #### ####   ##     ##  #  #    #   ## #
    # #   # #     #   # #   # ###   #   # #   #   #      #  # #     #   # # #
 #### #   # #     #   # #####  #    #   # #   #   #      #  ##      #   # # #
#   # #   # #     #   # #      #     #### #   #   #      #  # #     #   #   #
 #### ####   ###   ####  ###   #        # #   #  ###  #  #  #  #   ###  #   #
                                     ###               ##
""",
    ),
    (
        "nopqrstuvwxyz",
        """
                                      #
                                      #
####   ###  ####   #### # ##   ####  ###  #   # #   # #   # #   # #   # #####
#   # #   # #   # #   # ##  # #       #   #   # #   # #   #  # #  #   #    #
#   # #   # #   # #   # #      ###    #   #   # #   # # # #   #   #   #   #
#   # #   # #   # #   # #         #   #   #   #  # #  # # #  # #   ####  #
#   #  ###  ####   #### #     ####     ##  ####   #    # #  #   #     # #####
            #         #                                            ###
""",
    ),
    (
        "0123456789.,:",
        """
 ###    #    ###  ####     #  #####  ###  #####  ###   ###
#   #  ##   #   #     #   ##  #     #     #   # #   # #   #
#  ##   #       #     #  # #  ####  #        #  #   # #   #               #
# # #   #      #   ###  #  #      # ####    #    ###   ####
##  #   #     #       # #####     # #   #  #    #   #     #
#   #   #    #        #    #  #   # #   #  #    #   #     #  ##   ##      #
 ###   ###  ##### ####     #   ###   ###   #     ###   ###   ##   ##
                                                                 #
""",
    ),
    (
        "-_/()+%=<>|*?",
        """
                #    #   #          ##             #   #      #          ###
                #   #     #     #   ##  #         #     #     #     #   #   #
               #   #       #    #      #  #####  #       #    #   # # #     #
#####         #    #       #  #####   #         #         #   #    ###     #
             #     #       #    #    #    #####  #       #    #   # # #   #
            #       #     #     #   #  ##         #     #     #     #
            #        #   #             ##          #   #      #           #
      #####
""",
    ),
)


@cache
def _glyphs() -> dict[str, np.ndarray]:
    glyphs = {" ": np.zeros((GLYPH_HEIGHT, GLYPH_WIDTH), dtype=bool)}
    for characters, sheet in _SHEETS:
        lines = sheet.split("\n")[1 : 1 + GLYPH_HEIGHT]
        pixels = np.array([[c == "#" for c in line.ljust(6 * len(characters))] for line in lines])
        for i, character in enumerate(characters):
            glyphs[character] = pixels[:, 6 * i : 6 * i + GLYPH_WIDTH]
    return glyphs


def draw_text(canvas: np.ndarray, text: str, top: int, middle: int, *, width: int) -> None:
    """Write a line centred at column `middle` into an image, in place; cut to `width` pixels.

    Args:
        canvas: [H, W, 3] uint8; text: characters that the font lacks become '?'; top: row of the line's upper edge.
    """
    glyphs = _glyphs()
    advance = (GLYPH_WIDTH + 1) * SCALE
    text = text[: max(width // advance, 0)]
    left = middle - len(text) * advance // 2
    for i, character in enumerate(text):
        glyph = np.kron(glyphs.get(character, glyphs["?"]), np.ones((SCALE, SCALE), dtype=bool))
        x = left + i * advance
        part = canvas[max(top, 0) : top + glyph.shape[0], max(x, 0) : x + glyph.shape[1]]
        part[glyph[: part.shape[0], : part.shape[1]]] = (30, 34, 40)
