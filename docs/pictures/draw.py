"""Draw how an error reaches a block under each algorithm; `python docs/pictures/draw.py` writes one SVG for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

WIDTH, HEIGHT, ROW = 720, 190, 110
BLOCKS = (150, 320, 490)
"""Where the three blocks of the network begin; its last one ends at the loss."""
BOX, TALL = 90, 44
LOSS = 640
STYLE = """
  svg { --ink: #1b2127; --soft: #7a858f; --error: #c2458f; --tangent: #2a9d5c; --box: #f6f8f9 }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e4e8eb; --soft: #9aa5af; --error: #f07bc0; --tangent: #6fcf97; --box: #1c2227 }
  }
  text { font: 14px system-ui, sans-serif; fill: var(--ink); text-anchor: middle; dominant-baseline: middle }
  .small { font-size: 12px } .said { fill: var(--error); font-size: 13px } .along { fill: var(--tangent); font-size: 13px }
  .error { fill: none; stroke: var(--error); stroke-width: 2 } .pass { fill: none; stroke: var(--soft); stroke-width: 2 }
  .tangent { fill: none; stroke: var(--tangent); stroke-width: 2; stroke-dasharray: 6 4 }
  .box { fill: var(--box); stroke: var(--ink) }
  .cut { stroke: var(--soft); stroke-dasharray: 2 4; stroke-width: 2 }
"""
COLORS = {"error": "var(--error)", "tangent": "var(--tangent)", "pass": "var(--soft)"}

Marks = Iterator[str]


def text(x: float, y: float, said: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{said}</text>'


def arrow(path: str, kind: str) -> str:
    return f'<path d="{path}" class="{kind}" marker-end="url(#{kind})"/>'


def box(x: float, y: float, wide: float, tall: float, said: str, kind: str = "") -> Marks:
    yield f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{tall:g}" rx="6" class="box"/>'
    yield text(x + wide / 2, y + tall / 2 + 1, said, kind)


def cut_of(k: int) -> float:
    """Where the cut behind block k is."""
    return BLOCKS[k] + BOX + 40


def network(*, cuts: bool = True, y: float = ROW, names: tuple[str, ...] = ("block 1", "block 2", "block 3")) -> Marks:
    """The network, from left to right, with its loss."""
    yield text(90, y, "x")
    for start, name in zip(BLOCKS, names, strict=True):
        yield from box(start, y - TALL / 2, BOX, TALL, name)
    for left, right in zip((104, *(start + BOX for start in BLOCKS)), (*BLOCKS, LOSS - 26), strict=True):
        yield arrow(f"M{left + 2} {y} H{right - 4}", "pass")
    yield text(LOSS, y, "loss")
    for k in (0, 1) if cuts else ():
        yield f'<path d="M{cut_of(k)} {y - 34} V{y + 34}" class="cut"/>'


def own_error() -> str:
    """The last block's own, true error."""
    return arrow(f"M{LOSS} {ROW - 14} Q{LOSS - 20} {ROW - 44} {BLOCKS[2] + BOX / 2} {ROW - TALL / 2 - 3}", "error")


def broadcast(source: float, said: tuple[str, str], y: float = 22) -> Marks:
    """From one place straight to the cuts of both hidden blocks."""
    for k in (0, 1):
        yield arrow(
            f"M{source} {ROW - 14} Q{source} {y} {source - 40} {y} H{cut_of(k) + 20} Q{cut_of(k)} {y} {cut_of(k)} {ROW - 40}",
            "error",
        )
        yield from box(cut_of(k) - 2, y - 13, 44, 26, said[k], "said")


def tangents(said: str) -> Marks:
    """Directions that are added at the cuts and carried to the output."""
    for k in (0, 1):
        yield text(cut_of(k), ROW + 62, f"u<tspan dy='4' font-size='10'>{k + 1}</tspan>", "along")
        yield arrow(f"M{cut_of(k)} {ROW + 50} V{ROW + 12}", "tangent")
        yield arrow(f"M{cut_of(k) + 8} {ROW + 34} H{(BLOCKS[2], LOSS - 30)[k] - 4}", "tangent")
    yield text(LOSS - 30, ROW + 62, said, "along")


def heads(*, into: str, cuts: tuple[int, ...] = (0, 1)) -> Marks:
    """A head at each cut, whose gradient returns to its block."""
    for k in cuts:
        x = cut_of(k)
        yield from box(x - 34, 12, 68, 28, f"head {k + 1}", "small")
        yield arrow(f"M{x + 8} {ROW - 4} V44", "pass")
        yield arrow(f"M{x - 12} 42 Q{x - 20} {ROW - 40} {x - 44} {ROW - TALL / 2 - 3}", "error")
        yield text(x - 44, 58, into, "said")


def sweep(said: str, names: tuple[str, ...] = ()) -> Marks:
    """From block to block; through other weights, where these have names."""
    yield from network(cuts=False)
    for left, right in ((BLOCKS[2] + BOX, LOSS - 20), (BLOCKS[1] + BOX, BLOCKS[2]), (BLOCKS[0] + BOX, BLOCKS[1])):
        yield arrow(f"M{right} {ROW - 12} Q{(left + right) / 2} {ROW - 52} {left - 20} {ROW - TALL / 2 - 3}", "error")
    for start, name in zip(BLOCKS, names, strict=False):
        yield from box(start + BOX + 12, ROW - 66, 44, 26, name, "said")
    yield text(WIDTH / 2 + 30, 22, said, "said")


def bp() -> Marks:
    yield from sweep("the error passes back through every block's own weights")


def fa() -> Marks:
    yield from sweep("the error passes back through random weights, layer by layer", ("B₂", "B₃"))


def usf() -> Marks:
    yield from sweep("the error passes back through the weights' signs, all of one size", ("± s", "± s"))


def brsf() -> Marks:
    yield from sweep(
        "the error passes back through the weights' signs, of random sizes that are new in every step", ("±|R|", "±|R|")
    )


def frsf() -> Marks:
    yield from sweep("the error passes back through the weights' signs, of random sizes that stay", ("±|R|", "±|R|"))


def kp() -> Marks:
    yield from sweep("the error passes back through weights that take every step that W takes", ("B₂", "B₃"))


def spsa() -> Marks:
    for y, sign in ((ROW - 40, "+"), (ROW + 40, "−")):
        yield from network(cuts=False, y=y, names=tuple(f"θ{'₁₂₃'[k]} {sign} εv" for k in range(3)))
    yield text(LOSS + 4, ROW, "difference", "said")
    for start, k in zip(BLOCKS, "₁₂₃", strict=True):
        yield arrow(f"M{LOSS - 34 if k == '₃' else start + 192} {ROW} H{start + BOX / 2 + 24}", "error")
        yield from box(start + BOX / 2 - 22, ROW - 11, 44, 22, f"c v{k}", "said")


def dfa() -> Marks:
    yield from network()
    yield from broadcast(LOSS, ("B₁", "B₂"))
    yield own_error()
    yield text(LOSS + 40, 60, "e = dL/dz", "said")


def node() -> Marks:
    yield from network()
    yield from broadcast(LOSS, ("c u₁", "c u₂"))
    yield own_error()
    yield text(WIDTH / 2, ROW + 58, "c: the loss with noise σu₁, σu₂ at the cuts, less the loss without, over σ", "small")


def dkp() -> Marks:
    yield from dfa()
    yield text(WIDTH / 2, ROW + 58, "each B learns from e and the block's output, as the last weights do", "small")


def drtp() -> Marks:
    yield from network()
    yield text(LOSS, 22, "y", "said")
    for k in (0, 1):
        yield arrow(f"M{LOSS - 12} 22 H{cut_of(k) + 20} Q{cut_of(k)} 22 {cut_of(k)} {ROW - 40}", "error")
        yield from box(cut_of(k) - 2, 9, 44, 26, f"−B{'₁₂'[k]}", "said")
    yield own_error()
    yield text(WIDTH / 2, ROW + 58, "the target is known before the pass: a block need not wait for the next", "small")


def fdfa() -> Marks:
    yield from dfa()
    yield from tangents("ẏ: the Bs learn from it")


def grape() -> Marks:
    yield from dfa()
    yield from tangents("ẏ: the Bs turn towards it")


def local() -> Marks:
    yield from network()
    yield from heads(into="∇ℓ")
    yield own_error()


def ff() -> Marks:
    yield from network()
    for k in (0, 1):
        x = cut_of(k)
        yield from box(x - 34, 12, 68, 28, "|h|² &gt; θ ?", "small")
        yield arrow(f"M{x + 8} {ROW - 4} V44", "pass")
        yield arrow(f"M{x - 12} 42 Q{x - 20} {ROW - 40} {x - 44} {ROW - TALL / 2 - 3}", "error")
    yield text(WIDTH / 2, ROW + 58, "each sample passes twice, with its label and with a wrong one written into it", "small")


def fg() -> Marks:
    yield from network()
    yield from tangents("slopes along u₁, u₂")
    for k in (0, 1):
        x = cut_of(k)
        yield arrow(f"M{x - 6} {ROW - 46} Q{x - 20} {ROW - 58} {x - 70} {ROW - TALL / 2 - 3}", "error")
        yield text(x + 8, ROW - 58, "slope × u", "said")
    yield own_error()


PICTURES: dict[str, Callable[[], Marks]] = {
    "bp": bp,
    "brsf": brsf,
    "dfa": dfa,
    "dkp": dkp,
    "drtp": drtp,
    "fa": fa,
    "fdfa": fdfa,
    "ff": ff,
    "fg": fg,
    "frsf": frsf,
    "grape": grape,
    "kp": kp,
    "local": local,
    "node": node,
    "spsa": spsa,
    "usf": usf,
}


def picture(name: str) -> str:
    """The SVG of one algorithm."""
    heads = "".join(
        f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto" '
        f'markerUnits="userSpaceOnUse"><path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>'
        for kind, color in COLORS.items()
    )
    marks = "\n".join(PICTURES[name]())
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    title = f"<title>How an error reaches a block in {name}</title>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{title}<style>{STYLE}</style><defs>{heads}</defs>\n{marks}\n</svg>\n'
    )


if __name__ == "__main__":
    for name in PICTURES:
        Path(__file__).with_name(f"{name}.svg").write_text(picture(name), encoding="utf-8")
