"""A page to go through suspicious labels: one file that shows them, takes decisions and hands out the corrections."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rb_noisy.errors import InputError
from rb_noisy.files import atomic_path, tensors_digest
from rb_noisy.label_issues import LabelIssues
from rb_noisy.pages import SHARED, render_page

SHOWN = 160  # CSS pixels of an image's longer side
EXACT = 64  # up to this side every pixel is kept, as PNG; photographs would make a page of 100 MB
REDUCED = 256  # and larger images stand in the page as JPEG with at most this side


def write_gallery(path: str | Path, issues: LabelIssues, images: Tensor, name: str, **options: Any) -> None:
    """Write `gallery` to a file, whole or not at all."""
    text = gallery(issues, images, name, **options)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def gallery(
    issues: LabelIssues,
    images: Tensor,
    name: str,
    *,
    top: int = 500,
    score: str = "joint",
    files: Sequence[str] | None = None,
    command: str | None = None,
) -> str:
    """The HTML page of the `top` most suspicious labels, with a decision for each and their export as corrections.csv.

    Args:
        images: (N, C, H, W) in [0, 1], all training images, by sample index; of more than three channels the first
            three are shown.
        name: what the data set is called.
        score: what the issues are ranked by.
        files: N file names, by sample index, for images that come from files.
        command: what the page says to run with the corrections; None says nothing.

    Raises:
        InputError: there is no issue, or an issue is of a sample that `images` or `files` do not have.
    """
    count = min(top, len(issues.index))
    if count < 1:
        raise InputError(f"a page of {count} samples shows nothing; give top of at least 1, and issues")
    known = min(len(images), len(images) if files is None else len(files))
    if (largest := int(issues.index.max())) >= known:
        raise InputError(f"sample {largest} is suspicious but there are only {known} images (and file names)")
    columns = (issues.index, issues.given, issues.suggested, issues.kappa, issues.loss, issues.score)
    samples = [
        {
            "index": index,
            "given": given,
            "suggested": suggested,
            "file": None if files is None else files[index],
            "image": _image(images[index]),
            "figures": (("κ", _figure(kappa, 1)), ("loss", _figure(loss, 2)), ("score", _figure(value, 3))),
        }
        for index, given, suggested, kappa, loss, value in zip(*(c[:count].tolist() for c in columns), strict=True)
    ]
    height, width = images.shape[2:]
    # A whole number of screen pixels for each of a small image's, so that all are equally wide.
    longer = max(height, width)
    scale = SHOWN // longer if longer <= EXACT else SHOWN / longer
    # As JSON, because an attribute would turn a carriage return in a name into a line feed.
    facts = {
        "key": f"rb-noisy label-issues {_digest(issues, images)}",
        "classes": issues.class_names,
        "samples": [[sample["index"], sample["given"], sample["suggested"], sample["file"]] for sample in samples],
    }
    return render_page(
        SHARED,
        "gallery",
        title=f"{name}: labels that may be wrong",
        issues=issues,
        samples=samples,
        filters=[(key, f"{key.title()} label", _occurring(samples, key, issues)) for key in ("given", "suggested")],
        size=(max(1, round(width * scale)), max(1, round(height * scale))),
        small=longer <= EXACT,
        score=score,
        command=command,
        facts=json.dumps(facts),
    )


def _digest(issues: LabelIssues, images: Tensor) -> str:
    """Of the images, labels and classes, by which decisions are kept: not of the ranking, so that they outlive it."""
    order = issues.index.argsort()
    labels = [("index", issues.index[order]), ("given", issues.given[order])]
    names = torch.frombuffer(bytearray(json.dumps(issues.class_names).encode()), dtype=torch.uint8)
    return tensors_digest([("images", images), *labels, ("names", names)])


def _occurring(samples: list[dict[str, Any]], key: str, issues: LabelIssues) -> list[tuple[int, str, int]]:
    """(label, class name, how many samples) of the labels that are there, in the order of the classes."""
    labels = [sample[key] for sample in samples]
    return [(label, issues.class_names[label], labels.count(label)) for label in sorted(set(labels))]


def _image(image: Tensor) -> str:
    """The data: address of an image (C, H, W) in [0, 1]."""
    from PIL import Image

    levels = (image * 255).round().to(torch.uint8)
    picture = Image.fromarray((levels[:3].permute(1, 2, 0) if len(levels) >= 3 else levels[0]).numpy())
    buffer = io.BytesIO()
    if exact := max(picture.size) <= EXACT:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.thumbnail((REDUCED, REDUCED))
        picture.save(buffer, "JPEG", quality=85)
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(value: float, digits: int) -> str:
    return "–" if value != value else f"{value:.{digits}f}"  # NaN is the κ of what nothing attacked
