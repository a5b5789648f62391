"""How the claims and the figure call what is trained."""

from __future__ import annotations

NAMES = {
    "encoder": "encoder alone",
    "decoder": "decoder alone",
    "joint": "both, jointly",
    "tied": "tied",
}
# Of these the limit of the tangent kernel for infinite width is known.
WITH_LIMIT = ("encoder", "decoder", "joint")
