"""What may be said of a comparison: of whom it speaks, and a text for a methods section."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradtrace.inference.correction import SAID
from gradtrace.inference.procedures import EXACT, Settings

MEANS = "of the groups' means over training, one pair from each run"
TESTS = {
    "paired": f"Student's paired t test {MEANS}",
    "welch": f"Welch's t test {MEANS}; it takes the two for independent, and is conservative where they rise and fall "
    "together in a run",
    "wilcoxon": f"Wilcoxon's signed-rank test {MEANS}",
    "permutation": "a permutation test that exchanges the two groups in whole runs; its statistic is the paired t "
    f"{MEANS}",
    "resampled": f"the corrected resampled t test (Nadeau and Bengio 2003) {MEANS}, which allows for folds that share "
    "training samples",
    "cluster": "a cluster-based permutation test over training (Maris and Oostenveld 2007)",
}


@dataclass(frozen=True)
class Design:
    """How a comparison was made. probe: its name, or None for the training itself. compared: how many p-values."""

    pairs: Sequence[tuple[str, str]]
    runs: int
    test: str
    correction: str
    settings: Settings
    own_mean: bool
    most: float | None
    probe: str | None
    windows: int
    compared: int


def population(design: Design) -> str:
    """Of whom a result speaks, in a sentence or two."""
    if design.runs == 1:
        return (
            "The result speaks of this one training run on these people: its steps are no independent trainings. "
            "Whether another start, other batches or other people would show the same is not tested."
        )
    if design.test == "resampled":
        return (
            "The result speaks of training runs on samples of these people, as large as a fold's. Whether other people "
            "would show the same is tested as far as folds can tell."
        )
    return (
        f"The result speaks of training runs like these {design.runs} on these people. Whether other people would show "
        "the same is not tested: any two sets of people differ, and enough runs on them show it."
    )


def methods(design: Design) -> str:
    """A text that can be cited, with what is to be borne in mind."""
    return " ".join([_values(design), _test(design), population(design), *_caveats(design)])


def _values(design: Design) -> str:
    pairs = "; ".join(f"{a} with {b}" for a, b in design.pairs)
    where = "in the training batches"
    if design.probe is not None:
        where = f"in the probe {design.probe!r}, at constant weights"
    text = f"Spectra were recorded with gradtrace during training and compared between groups ({pairs}) {where}. "
    if design.own_mean:
        text += (
            "Values that grow with a matrix were taken at the scale of each group's own mean, so that sizes of groups "
            "do not enter by the average of the loss. They were compared by ratios, other metrics by differences."
        )
    else:
        text += "Values were taken as they enter the batch's gradient, so that larger groups have larger ones."
    if design.most is not None:
        text += f" Steps count in which neither group was more than {design.most:g} times as large as the other."
    return text


def _test(design: Design) -> str:
    settings, text = design.settings, f"The test was {TESTS[design.test]}"
    if design.test == "cluster" and design.runs > 1:
        text += f", in up to {design.windows} windows of training, whose signs were changed in whole runs"
    elif design.test == "cluster":
        text += (
            f", in up to {design.windows} windows of training, averaged into stretches several autocorrelation times "
            "long, whose signs were changed"
        )
    if design.test == "resampled":
        text += f", with {settings.overlap:g} test samples for each training sample"
    if design.test in ("permutation", "cluster"):
        text += (
            f"; all changes of signs were tried where at most {EXACT} can change, else {settings.draws} at random "
            f"(seed {settings.seed})"
        )
    return f"{text}. Of {design.compared} comparisons {SAID[design.correction]}."


def _caveats(design: Design) -> list[str]:
    found = [
        "A grouping that is the training target, or close to it, differs by construction: the losses of its groups "
        "pull in different directions, whatever the people in them are like.",
    ]
    if design.probe is None:
        found.append(
            "In training batches, sizes of groups and the composition of batches are confounds: ranks are bounded by "
            "the number of samples, and the mean gradient of fewer samples is noisier, hence larger. A probe with "
            "groups of equal size, or only steps in which they are, rules that out."
        )
    if design.runs > 1 and design.test != "resampled":
        found.append(
            "Runs were taken for independent. Folds of a cross-validation are not, as they share training samples: "
            "there, the corrected resampled t test is right."
        )
    return found
