"""Two targets on the same questions: what changed, and whether chance explains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from serving.evaluation.figures import MEASURES, METRICS, Value, group_of, values_by_item
from serving.evaluation.scoring import Scored
from serving.evaluation.statistics import holm, mcnemar, paired

SIGNIFICANCE = 0.05
Flag = Literal["regression", "improvement", ""]
Test = Literal["McNemar, exact", "paired bootstrap"]


class Change(BaseModel):
    """One figure of one group, before and after, over the items that both targets answered.

    `p` is two-sided; `p_adjusted` allows for the number of languages that are tested (Holm), and decides the flag.
    `lost` and `won` count the items that got worse and better.
    """

    model_config = ConfigDict(frozen=True)

    metric: str
    group: str
    """`all`, or the tag of a language"""
    items: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    lost: int
    won: int
    test: Test
    p: float
    p_adjusted: float
    flag: Flag


class Comparison(BaseModel):
    """A target against the first one."""

    model_config = ConfigDict(frozen=True)

    before: str
    after: str
    changes: list[Change]

    @property
    def regressions(self) -> list[Change]:
        """What got worse, and not by chance."""
        return [change for change in self.changes if change.flag == "regression"]


def compare(before_name: str, before: Sequence[Scored], after_name: str, after: Sequence[Scored]) -> Comparison:
    """All metrics, over all answers and by language."""
    changes = []
    for metric, value in (METRICS | MEASURES).items():
        groups = list(dict.fromkeys(map(group_of, before)))
        whole = _change(metric, "all", before, after, value)
        parts = [
            _change(
                metric,
                group,
                [one for one in before if group_of(one) == group],
                [one for one in after if group_of(one) == group],
                value,
            )
            for group in (groups if len(groups) > 1 else [])
        ]
        found = [part for part in parts if part]
        adjusted = holm([part.p for part in found])
        changes += [_flagged(whole, whole.p)] if whole else []
        changes += [_flagged(part, p) for part, p in zip(found, adjusted, strict=True)]
    return Comparison(before=before_name, after=after_name, changes=changes)


def _change(metric: str, group: str, before: Sequence[Scored], after: Sequence[Scored], value: Value) -> Change | None:
    """None where no item has the figure on both sides."""
    first, second = values_by_item(before, value), values_by_item(after, value)
    shared = [item for item in first if item in second]
    if not shared:
        return None
    means = [(sum(first[item]) / len(first[item]), sum(second[item]) / len(second[item])) for item in shared]
    old, new = [pair[0] for pair in means], [pair[1] for pair in means]
    lost, won = sum(one > other for one, other in means), sum(one < other for one, other in means)
    difference = paired(old, new)
    single = metric in METRICS and all(len(each[item]) == 1 for each in (first, second) for item in shared)
    binary = single and all(value in (0, 1) for pair in means for value in pair)
    return Change(
        metric=metric,
        group=group,
        items=len(shared),
        before=sum(old) / len(old),
        after=sum(new) / len(new),
        difference=difference.value,
        low=difference.low,
        high=difference.high,
        lost=lost,
        won=won,
        test="McNemar, exact" if binary else "paired bootstrap",
        p=mcnemar(lost, won) if binary else difference.p,
        p_adjusted=1.0,
        flag="",
    )


def _flagged(change: Change, p_adjusted: float) -> Change:
    flag: Flag = ""
    if change.metric in METRICS and p_adjusted < SIGNIFICANCE and change.difference:
        flag = "regression" if change.difference < 0 else "improvement"
    return change.model_copy(update={"p_adjusted": p_adjusted, "flag": flag})
