"""Checks that a copy of a data set is the data set of that name."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.datasets.known import Known
    from pipelines.datasets.samples import Samples


class Trust(Enum):
    """Why a copy of a data set is accepted, in words for readers."""

    CONTENT = "content verified"
    DOWNLOAD = "download verified by tensorflow-datasets"
    UNVERIFIED = "unverified"
    SYNTHETIC = "synthetic"


def verify(
    name: str,
    raw: Mapping[str, Samples],
    known: Known,
    *,
    downloaded: bool = False,
    synthetic: bool = False,
    allow_unverified: bool = False,
) -> Trust:
    """Compares a copy with what is known of the complete data set.

    A copy is accepted if its content is known, if tensorflow-datasets has checked the
    download, or if it is marked as synthetic. If the content of the complete set is not
    known, the copy is accepted as unverified, which its title will say. Any other
    content is refused.

    Args:
        name: Name of the data set.
        raw: The copy, by the parts of `known.classes`.
        known: The complete data set.
        downloaded: Whether tensorflow-datasets has downloaded it.
        synthetic: Whether the data are marked as synthetic.
        allow_unverified: Whether unknown content is accepted as unverified.

    Returns:
        Why it is accepted.

    Raises:
        ValueError: If it does not.
    """
    for part, samples in raw.items():
        _check_classes(name, part, samples, known)
    if synthetic:
        return Trust.SYNTHETIC
    unknown = []
    for part, samples in raw.items():
        good = {known.content.get(part), known.partial_content.get(part)}
        content = samples.content()
        if content not in good:
            unknown.append(f"{part} samples with content {content}")
    if not unknown:
        return Trust.CONTENT
    if downloaded:
        return Trust.DOWNLOAD
    if known.content and not allow_unverified:
        expected = ", ".join(f"{part} {known.content[part]}" for part in raw)
        raise ValueError(
            f"This is not the {name} that is known: the hashes of its samples differ, "
            f"whatever their order. Received: {', '.join(unknown)}; expected: "
            f"{expected}. Use an unchanged copy. If it is meant to differ, "
            "`--allow-unverified` takes it, and every table will call it unverified."
        )
    return Trust.UNVERIFIED


def _check_classes(name: str, part: str, samples: Samples, known: Known) -> None:
    """Checks that a copy, or a part of it, can be the data set at all."""
    official, found = known.classes[part], samples.classes
    if samples.x.shape[1:] != known.shape:
        raise ValueError(
            f"Images of {name} have shape {known.shape}. Received: {part} images of "
            f"shape {samples.x.shape[1:]}"
        )
    if len(found) != len(official) or not all(found):
        raise ValueError(
            f"{name} has {len(official)} classes, and each must occur. Received: "
            f"{part} labels {found}, by class"
        )
    complete = sum(found) == sum(official)
    too_many = any(n > most for n, most in zip(found, official, strict=True))
    if too_many or (complete and tuple(found) != official):
        raise ValueError(
            f"The {part} samples of {name} are {list(official)} by class, or fewer in "
            f"an incomplete copy. Received: {found}"
        )
