"""The picture of one step: who may see whom, drawn from the rule that decoding itself uses.

    python benchmarks/picture_mask.py --output docs/pictures/step.svg

K = 3 tokens of a draft are verified, and a block of K masks is read after each number of accepted tokens.
"""

import argparse
from pathlib import Path

import torch

from wavedraft.generation.drafting.structured_mask import draft_mask_function

K, CACHED, CELL, LEFT, TOP = 3, 4, 22, 150, 96
COLOURS = {"text": "#2b5c8a", "draft": "#b45309", "masks": "#15803d"}
STYLE = "font-family:ui-sans-serif,Helvetica,Arial,sans-serif;font-size:13px"


def kind_of(index: int) -> str:
    """Of a key: a cached token of the text, a token of the draft, or a mask."""
    return "text" if index < CACHED else "draft" if index < CACHED + K else "masks"


def picture() -> str:
    num_queries = K + K * K
    may_see = draft_mask_function(K, K, torch.arange(1, K + 1), torch.tensor([CACHED]))
    queries, keys = torch.arange(num_queries)[:, None], torch.arange(CACHED + num_queries)[None]
    visible = may_see(torch.tensor(0), torch.tensor(0), queries, keys).tolist()
    cells, labels = [], []
    for row in range(num_queries):
        y = TOP + row * CELL + (row >= K) * 8 + max(0, (row - K) // K) * 4
        block = (row - K) // K
        name = f"draft {row + 1}" if row < K else f"mask {(row - K) % K + 1}, after {block + 1}"
        labels.append(f'<text x="{LEFT - 10}" y="{y + 15}" text-anchor="end">{name}</text>')
        for column in range(CACHED + num_queries):
            x = LEFT + column * CELL + (column >= CACHED) * 8 + (column >= CACHED + K) * 8
            x += max(0, (column - CACHED - K) // K) * 4
            fill = COLOURS[kind_of(column)] if visible[row][column] else "#eef1f4"
            cells.append(f'<rect x="{x}" y="{y}" width="{CELL - 3}" height="{CELL - 3}" rx="3" fill="{fill}"/>')
    width, height = LEFT + (CACHED + num_queries) * CELL + 40, TOP + num_queries * CELL + 40
    heads = [(LEFT, "text, cached", "text"), (LEFT + CACHED * CELL + 8, "draft", "draft")]
    heads.append((LEFT + (CACHED + K) * CELL + 16, "masks after 1, 2, 3 accepted", "masks"))
    top = [f'<text x="{x}" y="{TOP - 12}" fill="{COLOURS[kind]}">{name}</text>' for x, name, kind in heads]
    title = "One forward: each row is a token, coloured is what it sees"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" style="{STYLE}" role="img">'
        f'<title>{title}</title><rect width="100%" height="100%" rx="8" fill="#ffffff" stroke="#d1d5db"/>'
        f'<text x="20" y="34" font-weight="bold">{title}</text>{"".join(top + labels + cells)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("step.svg"))
    arguments = parser.parse_args()
    arguments.output.write_text(picture(), encoding="utf-8")
    print(f"picture in {arguments.output}")


if __name__ == "__main__":
    main()
