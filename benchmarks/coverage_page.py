"""docs/models.md: what became of every architecture of open_clip."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_INTRODUCTION = """\
# Models

Every architecture of open_clip {open_clip}, exported with random weights and one layer a tower, and
compared with torch: {exported} of {all} export. `python -m benchmarks.coverage --docs FILE` writes
this page (torch {torch}, timm {timm}, transformers {transformers}).

Image size, patches, context length, pooling and activation are the published ones. Towers are 64
values wide where their library allows it. Every export of published weights makes the same
comparison again.

- **graph**: how `prompt.onnx` computes a prompt. `prefix` shares the context's states between
  classes; `sequence` is the text tower's own forward.
- **difference**: the largest difference of a feature from torch, of all graphs. An export with
  more than 1e-4 is refused.
- A star marks a small text encoder or tokenizer of the same family, in place of one that only the
  hub has.

Models that `transformers` saved, and checkpoint files: [commands.md](commands.md#ztune-export).
"""
_FAMILIES = {
    "CoCa": ("coca_",),
    "Hugging Face text encoders": ("roberta", "mt5-", "nllb-"),
    "SigLIP 2": ("SigLIP2",),
    "SigLIP": ("SigLIP",),
    "CLIPA": ("CLIPA",),
    "MetaCLIP 2": ("worldwide",),
    "MobileCLIP": ("MobileCLIP",),
    "EVA": ("EVA0",),
    "Perception Encoder": ("PE-",),
    "ViTamin": ("ViTamin",),
    "ConvNeXt": ("convnext",),
    "ResNet": ("RN",),
    "Other image towers of timm": ("swin", "vit_"),
    "ViT": ("ViT-",),
}


def family_of(name: str) -> str:
    """Return the family of an architecture, by words in its name."""
    return next(
        family for family, words in _FAMILIES.items() if any(word in name for word in words)
    )


def render(names: Sequence[str], tags: Mapping[str, Sequence[str]], rows: Mapping[str, Row]) -> str:
    """Return the page of `names`, with their published tags and the results so far."""
    exported = [name for name in names if "graph" in rows.get(name, {})]
    versions: Mapping[str, str] = rows[exported[0]]["versions"] if exported else {}
    page = [
        _INTRODUCTION.format_map(
            {key: versions.get(key, "?") for key in ("open_clip", "torch", "timm", "transformers")}
            | {"exported": len(exported), "all": len(names)}
        )
    ]
    for family in sorted({family_of(name) for name in names}, key=str.lower):
        page += [f"## {family}", "| model | tags | graph | pooling | difference |"]
        page.append("| --- | --- | --- | --- | --- |")
        for name in names:
            if family_of(name) == family:
                row = rows.get(name, {})
                published = ", ".join(tags.get(name, ())) or "none"
                star = "\\*" if row.get("stand_ins") else ""
                page.append(f"| `{name}`{star} | {published} | {_result(row)} |")
        page.append("")
    return "\n".join([*page, "## Refused", *_refused(names, rows), ""])


def _result(row: Row) -> str:
    if "graph" in row:
        return f"{row['graph']} | {row['pooling']} | {row['max_abs']:.1e}"
    return f"{'refused' if row else 'not run'} | |"


def _refused(names: Sequence[str], rows: Mapping[str, Row]) -> Iterator[str]:
    refused = [name for name in names if name in rows and "graph" not in rows[name]]
    for name in refused:
        yield f"- `{name}`: {rows[name].get('refused') or rows[name].get('failed')}"
    if not refused:
        yield "None of open_clip's architectures."
