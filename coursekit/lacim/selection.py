"""Training on several domains, and choosing among trained models by a *named* rule."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from coursekit import _check
from coursekit.lacim.model import Batch

RULES = ("training_domain_validation", "leave_one_domain_out", "oracle")


class Selection(NamedTuple):
    """What was chosen, by which rule, and the score of every setting."""

    rule: str
    setting: Any
    scores: dict


def accuracy(predict: Callable, x: Shaped[Tensor, "n ..."], y: Int[Tensor, " n"]) -> float:
    """Return the share of rows whose largest output is y; ``predict`` is called on batches.

    Parameters
    ----------
    predict
        Maps inputs to ``(batch, classes)``.
    x, y
        Rows and classes.

    Returns
    -------
    float
    """
    hits = [predict(rows).argmax(dim=1) for rows in x.split(1000)]
    return float((torch.cat(hits) == y).double().mean())


def hold_out(
    domains: Sequence[Batch], fraction: float = 0.2, *, generator: torch.Generator
) -> tuple[list[Batch], list[Batch]]:
    """Split every domain at random: what is trained on, and what is held out for the choice.

    Parameters
    ----------
    domains
        ``(x, y)`` a domain.
    fraction
        Held out of each.
    generator
        Draws the rows.

    Returns
    -------
    kept, held_out
    """
    _check.in_range("hold_out", "fraction", fraction)
    kept, held = [], []
    for x, y in domains:
        order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
        out, rest = order.tensor_split([round(fraction * len(x))])
        kept.append((x[rest], y[rest]))
        held.append((x[out], y[out]))
    return kept, held


def fit_domains(
    model: Any, domains: Sequence[Batch], steps: int, batch_size: int | None, *,
    generator: torch.Generator, held_out: Sequence[Batch] = (), check_every: int = 100,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Call ``model.update`` ``steps`` times, each time with a batch drawn from every domain.

    Parameters
    ----------
    model, domains
        Any method of this room, and ``(x, y)`` a domain.
    steps, batch_size
        Updates; examples a domain in each, drawn with replacement, or ``None`` for all.
    generator
        Draws the batches, and nothing else.
    held_out
        Where given, the state with the highest mean accuracy on these is what the model keeps,
        looked at every ``check_every`` steps and at the end; the earlier one in a tie.
    check_every
        Steps between looks.
    scheduler
        Of ``model.optimizer``, stepped after every update.

    Returns
    -------
    list of dict
        What each update returned; ``held_out`` is added at the steps that were looked at.

    Raises
    ------
    ValueError
        If a domain has labels of one class only.
    """
    for number, (x, y) in enumerate(domains):
        _check.shape("fit_domains", f"y of domain {number}", y, (len(x), ...))
        if not y.is_floating_point() and len(y.unique()) < 2:
            wanted = "fit_domains: expected two classes or more in every domain"
            raise ValueError(f"{wanted}, got {y.unique().tolist()} in domain {number}")
    history, best, kept = [], -1.0, None
    for step in range(1, steps + 1):
        history.append(model.update([_draw(x, y, batch_size, generator) for x, y in domains]))
        if scheduler is not None:
            scheduler.step()
        if held_out and (step % check_every == 0 or step == steps):
            scores = [accuracy(model.predict, x, y) for x, y in held_out]
            score = history[-1]["held_out"] = sum(scores) / len(scores)
            if score > best:
                best, kept = score, copy.deepcopy(model.state_dict())
    if kept is not None:
        model.load_state_dict(kept)
    return history


def _draw(x, y, size, generator):
    if size is None:
        return x, y
    rows = torch.randint(len(x), (size,), generator=generator, device=generator.device)
    rows = rows.to(x.device)
    return x[rows], y[rows]


def select(
    rule: str, models: Mapping[Any, Any], *, held_out: Sequence[Batch] | None = None,
    left_out: Sequence[Batch] | None = None, test: Batch | None = None,
) -> Selection:  # fmt: skip
    """Choose a setting among trained models by a named rule, which gets the data it may see only.

    ==============================  ================  ==========================================
    rule                            sees              score of a setting
    ==============================  ================  ==========================================
    ``training_domain_validation``  ``held_out``      mean over training domains of the accuracy
                                                      on their held-out parts
    ``leave_one_domain_out``        ``left_out``      mean over k of the accuracy on training
                                                      domain k of the model trained without it
    ``oracle``                      ``test``          accuracy on the test domain: no method can
                                                      be had that way, so label it wherever shown
    ==============================  ================  ==========================================

    Parameters
    ----------
    rule
        A name of the table.
    models
        From setting to a model with ``predict``; for ``leave_one_domain_out`` to a list of them.
        Under ``oracle`` they are those of the last step.
    held_out, left_out, test
        What the rule sees. Anything else given is refused, so no rule but the oracle can be handed
        the test domain.

    Returns
    -------
    Selection
        The first setting in a tie.

    Raises
    ------
    ValueError
        For an unknown rule, no setting, the wrong data, or lists of another length.

    Source: I. Gulrajani and D. Lopez-Paz, arXiv:2007.01434, section 3. Curriculum: L6.
    """
    _check.one_of("select", "rule", rule, RULES)
    given = {"held_out": held_out, "left_out": left_out, "test": test}
    needed = dict(zip(RULES, given, strict=True))[rule]
    names = [name for name, data in given.items() if data is not None]
    if names != [needed] or not models:
        wanted = f"select: expected models and {needed} alone for {rule}"
        raise ValueError(f"{wanted}, got {len(models)} models and {names}")
    domains = [test] if test is not None else list(held_out or left_out or ())
    scores = {}
    for setting, model in models.items():
        team = model if rule == "leave_one_domain_out" else [model] * len(domains)
        if len(team) != len(domains) or not domains:
            wanted = f"select: expected a model for each of {len(domains)} domains"
            raise ValueError(f"{wanted}, got {len(team)} for setting {setting!r}")
        pairs = zip(team, domains, strict=True)
        scores[setting] = sum(accuracy(m.predict, x, y) for m, (x, y) in pairs) / len(domains)
    return Selection(rule, max(scores, key=scores.__getitem__), scores)
