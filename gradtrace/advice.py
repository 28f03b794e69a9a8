"""Sentences on what would improve the measuring of a parameter, or of a batch. Each names what it is about."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradtrace.bounds import Bound
from gradtrace.evidence import Use
from gradtrace.gather import Rung
from gradtrace.groups import Labels, group_name

NAMED, MOST = 4, 6  # parameters named in one note on ranks, and such notes
NEW_ADAPTER = "`gradtrace plugins new NAME` starts one"


@dataclass(frozen=True)
class Case:
    """What is known about one parameter.

    measured: its attributes as a run stores them. hidden: the custom autograd functions that take it. suspects: the
    adapters without which its groups add up. mixed: rows of its op are fed by several samples. is_opaque: only passes
    over the whole graph are left for it. cells: how many cells of groups the batch has.
    """

    measured: Mapping[str, Any]
    uses: Sequence[Use] = ()
    hidden: Sequence[str] = ()
    suspects: Sequence[str] = ()
    reentrant: bool = False
    finite: bool = True
    zero: bool = False
    mixed: bool = False
    is_opaque: bool = False
    cells: int = 1

    @property
    def rung(self) -> str:
        return str(self.measured["rung"])

    @property
    def per_cell(self) -> str:
        """What is done for every cell, and how often that is."""
        return f"for each cell of groups ({self.cells} in this batch)"


def advice_on(case: Case) -> tuple[str, ...]:
    """What would improve the measuring of a parameter that has a gradient; empty where nothing is to be wished for."""
    if not case.finite:
        return (
            "Its gradient is not finite in this batch, so no audit could pass. Find out where the NaN or inf arises.",
        )
    if case.suspects:
        return (_on_suspects(case),)
    found = [*_on_unseen(case)] if case.rung in ("global", "ungrouped") else [*_on_uses(case)]
    if case.measured["coupled"] and case.rung not in ("global", "ungrouped"):
        found.append(_on_batch_norm(case))
    if case.measured["reason"] == Rung.UNKNOWN_OWNERS:
        found.append(
            "A part of its gradient reaches it on no way from a sample (a penalty that the loss adds, say) and counts "
            "in `all` only: keep such terms out of the loss (an optimizer's weight_decay) if the groups shall add up."
        )
    if case.zero:
        found.append(
            "Its gradient is exactly zero in this batch, so the audits had nothing to see: normal for what sits behind "
            "a layer that starts at zero; otherwise look for a dead unit or a saturated function."
        )
    return tuple(dict.fromkeys(found))


def advice_on_untrained(uses: Sequence[Use]) -> str:
    """Why a parameter that is trained got no gradient, as far as the calls tell."""
    if not uses:
        return (
            "No call that records gradients used it in this batch: it is unused, or used in a branch that this batch "
            "did not take, or only under torch.no_grad()."
        )
    functions = ", ".join(dict.fromkeys(f"`{use.function}`" for use in uses))
    return (
        f"{functions} used it, and no way leads from there to the loss: the loss leaves that output out, or it is "
        "detached in between."
    )


def _on_uses(case: Case) -> Iterator[str]:
    unclaimed = [use for use in case.uses if use.adapter is None]
    for use in unclaimed:
        yield (
            f"No adapter claims this call of `{use.function}`: its adjoint is pulled back {case.per_cell}, and it has "
            f"no activations. An adapter makes it cheap and gives all kinds: {NEW_ADAPTER}, see the how-to Write an "
            "adapter."
        )
    claimants = list(dict.fromkeys(use.adapter for use in case.uses if use.adapter))
    refused = [adapter for adapter in claimants if adapter not in case.measured["adapters"]]
    if not refused and not unclaimed and case.rung == "local":
        refused = claimants
    if refused:
        yield (
            f"Adapter {_listed(refused)} claims the call and could not be used on it: an argument was changed in place "
            "after the call (use the out-of-place function), or samples share rows of the op's output."
        )
    for use in case.uses:
        if not use.direct and case.measured["reason"] != Rung.UNKNOWN_OWNERS:  # a penalty is no op of the model's
            yield (
                f"`{use.function}` does not use the parameter itself but what {_listed(use.arithmetic)} made of it: "
                f"right, at the price of a way back through that {case.per_cell}. It would be factored if an op used "
                "the parameter itself."
            )


def _on_unseen(case: Case) -> Iterator[str]:
    """Of what is measured by passes over the whole graph, or not at all."""
    if case.rung == "ungrouped":
        yield _on_ungrouped(case)
    if case.mixed:
        yield _on_mixed(case)
    elif case.hidden:
        yield (
            f"The custom autograd function {_listed(case.hidden)} hides what is done with it{_price(case)}. Written "
            "with torch's own calls, or with the product by the parameter outside it, it would be factored."
        )
    elif case.is_opaque:
        yield (
            f"A use of it cannot be seen{_price(case)}: look for code that runs out of sight (torch.jit.trace, a "
            "solver that runs the model inside its backward pass)."
        )


def _on_ungrouped(case: Case) -> str:
    if case.reentrant:
        return (
            "A reentrant checkpoint allows no pass per group: checkpoint with use_reentrant=False, and it can be "
            f"measured by one more backward pass {case.per_cell}."
        )
    if not case.is_opaque:
        return (
            "Its gradient comes on no way from a sample (a penalty on weights that the loss adds, say), so there is "
            "nothing to split: keep that term out of the loss, or leave the parameter out (--parameters)."
        )
    return (
        "Even the masked passes over the whole graph do not add up: the backward pass is not linear or draws random "
        "numbers. Look for hooks that clip or clamp, and for custom backward functions that do."
    )


def _price(case: Case) -> str:
    if case.rung == "ungrouped":
        return ""
    return f", so one more backward pass is made {case.per_cell}, and only the gradient is known"


def _on_mixed(case: Case) -> str:
    where = _listed(dict.fromkeys(use.function for use in case.uses))
    return (
        f"Rows of {where} are fed by several samples, so none has an owner: a group's part is that of its share of the "
        "loss, as with coupling='loss'. If samples are not meant to meet inside the model, look for a wrong axis "
        "(batch_first, a softmax or a norm over the batch)."
    )


def _on_batch_norm(case: Case) -> str:
    return (
        "Batch norm lets samples see each other: a group's part is that of its rows. coupling='loss' "
        f"(--coupling loss) gives the gradient of the group's share of the loss, through the batch statistics, by one "
        f"more backward pass {case.per_cell}, and then only the gradient."
    )


def _on_suspects(case: Case) -> str:
    which = f"Adapter {_listed(case.suspects)}"
    functions = _listed(dict.fromkeys(use.function for use in case.uses if use.adapter))
    return (
        f"{which} is wrong on {functions}: with it the groups miss the gradient ({case.measured['reason']}), without "
        "it they add up. Correct it (gradtrace.testing.AdapterTests shows where), or uninstall it: the op is then "
        "measured without."
    )


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# ---------------------------------------------------------------------- the batch


def notes_on_batches(batches: Sequence[Labels | None], n_samples: int) -> Iterator[str]:
    """What should be known about the batch that was measured (the first), and about the labels of those after it."""
    if n_samples == 1:
        yield (
            "The first batch has one sample: whose row is whose was not put to the test, and no layout can be learned "
            "from it. Check with a batch of several."
        )
    first = batches[0]
    if first is None:
        yield "groups(batch) names no grouping: only `all` will be recorded. Return {grouping: one label per sample}."
        return
    looked = f"the first {len(batches)} batches" if len(batches) > 1 else "the first batch"
    for grouping, labels in first.of.items():
        having = [set(each.of.get(grouping, ())) for each in batches if each is not None]
        every = set().union(*having)
        if len(every) == 1:
            name = group_name(grouping, *every)
            yield f"All samples of {looked} are in the group {name}: there is nothing to compare by {grouping!r}."
        for label in sorted(every - set(labels), key=str):
            times = sum(label in each for each in having)
            yield (
                f"The group {group_name(grouping, label)} has no sample in the first batch, and some in {times} of "
                f"{looked}. In a step without it, it is recorded as absent: larger or stratified batches fill it."
            )


# ---------------------------------------------------------------------- ranks


def notes_on_ranks(bounds: Iterable[Bound]) -> Iterator[str]:
    """What keeps gradients from full rank, the tightest first; those that have the same reason together."""
    alike: dict[tuple[int, str], list[str]] = {}
    for bound in bounds:
        if bound.is_low:
            alike.setdefault((bound.rank, bound.reason), []).append(bound.parameter)
    for (rank, reason), names in sorted(alike.items())[:MOST]:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"The gradient of {', '.join(names[:NAMED])}{more} has rank {rank} at most: {reason}."
    if len(alike) > MOST:
        yield f"Other gradients cannot have full rank either, for {len(alike) - MOST} more reasons: see --json."
