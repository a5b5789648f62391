"""The table of all targets, from the recorded results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import common


def table(folder: Path) -> str:
    """One line for every target of every benchmark, with the number measured."""
    rows = []
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        for target in record["targets"]:
            sign = ">=" if target["at_least"] else "<="
            rows.append(
                [
                    f"[{file.stem}]({file.stem}.md)",
                    target["claim"],
                    f"{target['measured']:.4g}",
                    f"{sign} {target['bound']:.4g}",
                    "met" if target["met"] else "**missed**",
                ]
            )
    return common.table(["benchmark", "what", "measured", "target", ""], rows)


def main() -> None:
    """Writes `README.md` beside the results, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    folder = parser.parse_args().out
    text = (
        "# Targets\n\nWritten by `python -m benchmarks.targets` from the files here; "
        "each says with which versions and commit it was measured.\n\n"
        f"{table(folder)}\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
