"""A dataset as one HTML page, with a grid of pictures where its samples have some."""

from __future__ import annotations

import base64

from s3loader.inspection.dataset import DatasetView, Picture
from s3loader.pages import bars, escaped, facts, page, table
from s3loader.units import format_size

__all__ = ["dataset_page"]

_MOST_CLASSES = 40


def dataset_page(view: DatasetView) -> str:
    """The page. The figures stand in it as JSON too, in the element ``data``."""
    figures = [("samples", f"{view.samples:,}")]
    figures += [("shards", f"{view.shards:,}")] if view.shards else [("objects", f"{view.objects:,}")]
    figures += [("stored", "?" if view.stored is None else format_size(view.stored))]
    figures += [("classes", f"{len(view.classes):,}")] if view.classes else []
    figures += [("bytes of a sample, median", format_size(view.median))]
    parts = [f"<p>engine {escaped(view.engine)}</p>", facts(figures)]
    if view.pictures:
        parts += ["<h2>Pictures</h2>", '<div class="pictures">', *map(_figure, view.pictures), "</div>"]
    looked = "" if view.looked_at == view.samples else f", of {view.looked_at:,} samples that were looked at"
    if view.classes:
        read = "" if view.labels_read == view.samples else f", of {view.labels_read:,} labels that were read"
        shown = view.classes[:_MOST_CLASSES]
        parts += [f"<h2>Classes{read}</h2>", bars([(name or "(none)", count, f"{count:,}") for name, count in shown])]
        rest = view.classes[_MOST_CLASSES:]
        if rest:
            parts.append(f"<p>and {len(rest):,} more classes with {sum(count for _, count in rest):,} samples</p>")
    sizes = [(f"{format_size(one.low)} to {format_size(one.high)}", one.count, f"{one.count:,}") for one in view.sizes]
    parts += [f"<h2>Sizes of samples{looked}</h2>", bars(sizes)]
    rows = [(kind.extension or "(none)", f"{kind.count:,}", format_size(kind.bytes)) for kind in view.members]
    parts += [f"<h2>Members{looked}</h2>", table(("", "number", "bytes"), rows)]
    parts += ["<h2>An epoch</h2>", table(("", ""), view.explain, text=1)]
    parts += [f"<p>{escaped(note)}</p>" for note in view.notes]
    return page(view.name, parts, view.as_dict())


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.data).decode()
    label = f"<b>{escaped(picture.label)}</b> " if picture.label else ""
    return (
        f'<figure><img alt="{escaped(picture.key)}" src="data:{picture.mime};base64,{data}">'
        f"<figcaption>{label}{escaped(picture.key)}</figcaption></figure>"
    )
