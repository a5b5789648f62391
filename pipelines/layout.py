"""The paths of the stages' files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.params import Run

# The repository, and the folders of its code.
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("keras_dalign", "pipelines")


@dataclass(frozen=True)
class Layout:
    """The paths of all files below one folder.

    Attributes:
        root: The folder: the repository's for DVC, any other for the quickstart.
    """

    root: Path

    def arrays(self, dataset: str) -> Path:
        """The arrays of a prepared data set."""
        return self.root / "data" / f"{dataset}.npz"

    def description(self, dataset: str) -> Path:
        """The description of a prepared data set: counts, shapes, hash."""
        return self.root / "data" / f"{dataset}.json"

    def checkpoint(self, run: Run, epoch: int) -> Path:
        """The weights of an exploration after so many epochs."""
        return self.run(run) / f"epoch-{epoch:03d}.npz"

    def backup(self, run: Run) -> Path:
        """The backup of a killed run; DVC does not remove it."""
        return self.root / "backups" / f"{run.name}.npz"

    def logits(self, run: Run) -> Path:
        """A run's logits on training and test data."""
        return self.run(run) / "logits.npz"

    def history(self, run: Run) -> Path:
        """A run's history by epoch."""
        return self.run(run) / "history.json"

    def certificate(self, run: Run) -> Path:
        """A run's certificate."""
        return self.run(run) / "certificate.json"

    def provenance(self, run: Run) -> Path:
        """The environment and data of a run."""
        return self.run(run) / "provenance.json"

    def run(self, run: Run) -> Path:
        """The folder of a run."""
        return self.runs / run.name

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self.root / "runs"

    @property
    def rerun(self) -> Path:
        """Code and parameters of a rerun that is not finished."""
        return self.root / "backups" / "rerun.json"

    @property
    def measured(self) -> tuple[Path, ...]:
        """The folders of what runs, tunings and frontiers measured."""
        names = ("timings", "metrics", "tuning", "frontier")
        return tuple(self.results / name for name in names)

    def timing(self, run: Run) -> Path:
        """A run's wall time, in a file that DVC does not hash."""
        return self.results / "timings" / f"{run.name}.json"

    def metrics(self, run: Run) -> Path:
        """A run's metrics."""
        return self.results / "metrics" / f"{run.name}.json"

    @property
    def results(self) -> Path:
        """The folder of the committed results."""
        return self.root / "results"

    @property
    def table(self) -> Path:
        """The report's table in Markdown."""
        return self.results / "table.md"

    @property
    def overview(self) -> Path:
        """The part of it that the README shows."""
        return self.results / "overview.md"

    @property
    def code(self) -> Path:
        """The code that made the results; DVC does not hash it, as it names commits."""
        return self.results / "code.json"

    @property
    def csv(self) -> Path:
        """The numbers of all runs."""
        return self.results / "runs.csv"

    @property
    def summary(self) -> Path:
        """The means over seeds, as DVC metrics."""
        return self.results / "summary.json"

    def figure(self, dataset: str) -> Path:
        """The learning curves on a data set."""
        return self.results / "figures" / f"{dataset}.png"

    @property
    def html(self) -> Path:
        """The report as a page."""
        return self.results / "report.html"

    def tuning(self, dataset: str, augmentation: str, recipe: str) -> Path:
        """The errors of a recipe on held-out training samples."""
        return self.results / "tuning" / f"{dataset}-{augmentation}-{recipe}.json"

    def frontier(self, dataset: str, seed: int) -> Path:
        """Error and time against the share of epochs that is explored."""
        return self.results / "frontier" / f"{dataset}-{seed}.json"

    def study(self, name: str) -> Path:
        """The rows of a study of the mechanism."""
        return self.results / "studies" / f"{name}.json"

    def study_cells(self, name: str) -> Path:
        """The cells of a study that is not finished; DVC does not remove them."""
        return self.root / "backups" / "studies" / name

    @property
    def study_metrics(self) -> Path:
        """The numbers of the claims of all studies, as DVC metrics."""
        return self.results / "study-metrics.json"

    def study_figure(self, name: str) -> Path:
        """The figure of a study."""
        return self.results / "study-figures" / f"{name}.png"
