"""Draw the picture of the idea: from the trainer's bf16 to the memory that kernels read.

python -m tools.idea            writes docs/idea.svg
"""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).parents[1] / "docs/idea.svg"

WIDTH, HEIGHT = 1000, 420
INK, FAINT, PAPER = "#1f2933", "#7b8794", "#ffffff"
BF16, CODES, SCALES, OURS = "#3e7cb1", "#d1495b", "#edae49", "#e9f2ec"
SHARDS = ("q_proj", "k_proj", "v_proj")
STEPS = (
    ("plan", "where it lands: vLLM's own loader is traced"),
    ("quantize", "each row: int8 or fp8 codes, and a scale"),
    ("write in place", "when all shards of a layer are there"),
    ("prove", "all arrived, none moved, every worker ready"),
)


def text(x: float, y: float, words: str, size: int = 14, *, fill: str = INK, **more: str) -> str:
    """One line of words; `more` are attributes of SVG, with _ for -."""
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}"{extra}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, line: str = "none") -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" '
        f'stroke="{line}" stroke-width="1.5"/>'
    )


def arrow(*points: tuple[float, float]) -> str:
    path = " L ".join(f"{x} {y}" for x, y in points)
    return (
        f'<path d="M {path}" fill="none" stroke="{INK}" stroke-width="2" marker-end="url(#tip)"/>'
    )


def trainer() -> list[str]:
    """The left column: one bf16 tensor a shard, as wide as it has bytes."""
    parts = [text(30, 52, "Trainer", 20, font_weight="bold")]
    parts.append(text(30, 74, "stays in bf16, pushes as it always did", 13, fill=FAINT))
    for i, name in enumerate(SHARDS):
        y = 100 + 58 * i
        parts += [box(30, y, 190, 40, BF16)]
        parts.append(text(125, y + 25, f"{name}  bf16", fill=PAPER, text_anchor="middle"))
        parts.append(arrow((226, y + 20), (290, 162 + 16 * i)))
    return parts


def flashquant() -> list[str]:
    """The middle: what happens to one tensor."""
    parts = [box(298, 30, 360, 260, OURS, INK)]
    parts.append(text(318, 58, "flashquant", 20, font_weight="bold"))
    parts.append(text(642, 58, "in each vLLM worker", 13, fill=FAINT, text_anchor="end"))
    for i, (title, meaning) in enumerate(STEPS):
        y = 92 + 50 * i
        parts.append(text(318, y, f"{i + 1}  {title}", 15, font_weight="bold"))
        parts.append(text(338, y + 20, meaning, 13))
    return parts


def engine() -> list[str]:
    """The right column: codes and scales of one fused layer, where they always were."""
    parts = [text(730, 52, "vLLM, unmodified", 20, font_weight="bold")]
    parts.append(text(730, 74, "the very memory its kernels read", 13, fill=FAINT))
    for i, name in enumerate(SHARDS):
        y = 100 + 58 * i
        parts += [box(730, y, 95, 40, CODES), box(831, y, 16, 40, SCALES)]
        parts.append(text(777, y + 25, name[0], fill=PAPER, text_anchor="middle"))
    parts.append(text(862, 150, "qkv_proj"))
    parts.append(text(862, 170, "codes", 13, fill=CODES))
    parts.append(text(862, 188, "+ scales", 13, fill="#b07d1a"))
    parts.append(text(862, 208, "same address,", 13, fill=FAINT))
    parts.append(text(862, 224, "same graph", 13, fill=FAINT))
    parts.append(arrow((664, 178), (722, 178)))
    return parts


def outcomes() -> list[str]:
    """Below: the two ways that an update may end."""
    parts = [arrow((478, 294), (478, 318), (250, 318), (250, 340))]
    parts.append(arrow((478, 294), (478, 318), (740, 318), (740, 340)))
    for x, title, meaning in (
        (50, "all is well", "every bit is that of a fresh engine started on these weights"),
        (
            545,
            "anything is wrong",
            "the old weights are served, bit for bit, and an error says why",
        ),
    ):
        parts.append(box(x, 346, 400, 56, PAPER, INK))
        parts.append(text(x + 200, 369, title, 15, font_weight="bold", text_anchor="middle"))
        parts.append(text(x + 200, 389, meaning, 12, text_anchor="middle"))
    return parts


def picture() -> str:
    """The whole drawing, as SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif">'
    )
    tip = (
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" fill="{INK}"/>'
        "</marker></defs>"
    )
    title = "<title>bf16 tensors become int8 or fp8 in the memory that vLLM's kernels read</title>"
    paper = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="{PAPER}"/>'
    parts = [*trainer(), *flashquant(), *engine(), *outcomes()]
    return "\n".join([head, title, tip, paper, *parts, "</svg>"]) + "\n"


def main() -> int:
    """Write the picture."""
    PICTURE.write_text(picture())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
