"""The tables of a study: what READMEs show."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from benchmarks.study import ALPHA, Row, best_value, case_title, cases, corrected, differences, gains, interval
from examples.common.experiment import table


def tables(rows: Sequence[Row]) -> str:
    """One table for each task and level of noise, over the runs that were not for tuning."""
    return "\n\n".join(f"{case_title(*case)}:\n\n{_table(own)}" for case, own in cases(rows).items())


def overview(rows: Sequence[Row]) -> str:
    """A row for each method, a column for each task: test score after the last epoch, of all but Adam the gain over it.

    A gain is bold if its p-value, corrected for all comparisons of the table, is below ALPHA.
    """
    found = {case: own for case, own in cases(rows).items() if any(row.method == "adam" for row in own)}
    p_values = corrected(found)
    lines = [("training", *(case_title(*case) for case in found))]
    for method in dict.fromkeys(row.method for own in found.values() for row in own):
        cells = []
        for case, own in found.items():
            if method == "adam":
                cells.append(_shown(interval([row.test_last for row in own if row.method == "adam"])))
            elif (case, method) in p_values:
                gain = _shown(interval(differences(own, method, "adam")), sign="+")
                cells.append(f"**{gain}**" if p_values[case, method] < ALPHA else gain)
            else:
                cells.append("")
        lines.append((method, *cells))
    return table(lines)


def summary(rows: Sequence[Row]) -> str:
    """Adam's test scores in every task, and by how much each method differs from them with the same seeds.

    P-values are corrected for the comparisons of this score with Adam's in the same task; "p, all" for those of the
    scores after the last epoch in all tasks.
    """
    found = cases(rows)
    p_values = corrected(found)
    scores = {"test_last": 1, "test_best": 1, "test_loss_last": 3, "test_loss_best": 3}  # and their digits
    lines = [("task", "training", "its parameter", "last epoch", "p, all", "best epoch",
              "loss, last epoch", "loss, best epoch")]  # fmt: skip
    for case, own in found.items():
        adam = [row for row in own if row.method == "adam"]
        if not adam:
            continue
        levels = [_shown(interval([getattr(row, name) for row in adam]), digits) for name, digits in scores.items()]
        lines.append((case_title(*case), "adam", "", levels[0], "", *levels[1:]))
        gained = {name: gains(own, "adam", name) for name in scores}
        for method in gained["test_last"]:
            value = next(row.value for row in own if row.method == method)
            cells = [_shown_gain(gained[name][method], digits) for name, digits in scores.items()]
            chosen = "" if value is None else f"{value:g}"
            lines.append(("", method, chosen, cells[0], _shown_p(p_values[case, method]), *cells[1:]))
    return table(lines)


def tuning(rows: Sequence[Row]) -> str:
    """The validation scores of all values of each method's parameter, after the last epoch; the chosen one is bold."""
    tried: dict[tuple[float, str, str], list[Row]] = {}
    for row in rows:
        if row.phase == "tuning":
            tried.setdefault((-row.noise, row.task, row.method), []).append(row)
    lines = [("task", "training", "validation")]
    for (noise, task, method), own in sorted(tried.items(), key=lambda item: item[0][:2]):
        chosen = best_value(own)
        scores = {row.value: f"{row.valid_last:.2f}" for row in own if row.value is not None}
        shown = [
            f"{value:g}: {f'**{scores[value]}**' if value == chosen else scores[value]}" for value in sorted(scores)
        ]
        lines.append((case_title(task, -noise), method, ", ".join(shown)))
    return table(lines)


def _table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(row.method for row in rows))
    lines = [("training", "its parameter", "seeds", "test, last epoch", "test, best epoch", "test loss",
              "− adam", "− sam", "best epoch − sam", "relative sharpness", "CPU time : adam")]  # fmt: skip
    gained = [gains(rows, "adam"), gains(rows, "sam"), gains(rows, "sam", "test_best")]
    adam = [row.cpu_seconds for row in rows if row.method == "adam"]
    for name in names:
        own = [row for row in rows if row.method == name]
        sharpness = [row.relative_sharpness for row in own if row.relative_sharpness is not None]
        cells = [name, "" if own[0].value is None else f"{own[0].value:g}", str(len(own))]
        cells += [_shown(interval([row.test_last for row in own])), _shown(interval([row.test_best for row in own]))]
        cells += [_shown(interval([row.test_loss_last for row in own]), 3)]
        cells += [_shown_gain(found[name]) if name in found else "" for found in gained]
        cells.append(f"{mean(sharpness):.2f}" if sharpness else "")
        cells.append(f"{mean(row.cpu_seconds for row in own) / mean(adam):.2f}" if adam else "")
        lines.append(tuple(cells))
    return table(lines)


def _shown(found: tuple[float, ...], digits: int = 1, sign: str = "") -> str:
    return f"{found[0]:{sign}.{digits}f} ± {found[1]:.{digits}f}"


def _shown_gain(found: tuple[float, float, float], digits: int = 1) -> str:
    *difference, p_value = found
    return f"{_shown(tuple(difference), digits, '+')} (p {_shown_p(p_value)})"


def _shown_p(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
