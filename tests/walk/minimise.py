"""Deletes what a failure does not need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.walk.actions import Action
from tests.walk.runner import Failure, run
from tests.walk.world import Config, ParamSpec

Walk = tuple[Config, list[Action]]
_SEEDED = ("backward", "bad_backward", "broken_backward", "reentrant_backward", "closure_step")


def minimise(config: Config, actions: list[Action], kind: str, tries: int = 1500) -> Failure:
    """The shortest walk found that fails in the same way."""
    search = _Search(config, actions, kind, tries)
    while True:
        before = search.best
        search.delete()
        for candidates in (_configs, _params, _args):
            search.simplify(candidates)
        if search.best == before or search.tries < 0:
            assert search.failure is not None
            return search.failure


class _Search:
    def __init__(self, config: Config, actions: list[Action], kind: str, tries: int) -> None:
        self.best: Walk = (config, actions)
        self.kind, self.tries = kind, tries
        self.failure = run(config, actions)

    def accepts(self, walk: Walk) -> bool:
        """Whether it fails in the same way; then it is the best."""
        self.tries -= 1
        if self.tries < 0:
            return False
        found = run(*walk)
        if found is None or found.kind != self.kind:
            return False
        self.best, self.failure = walk, found
        return True

    def delete(self) -> None:
        """Take away actions: many at a time, then single ones."""
        part = len(self.best[1])
        while part:
            start = max(0, len(self.best[1]) - part)
            while True:
                config, actions = self.best
                self.accepts((config, actions[:start] + actions[start + part :]))
                if not start:
                    break
                start = max(0, start - part)
            part //= 2

    def simplify(self, candidates: Callable[[Config, list[Action]], Iterator[Walk]]) -> None:
        """Take each simpler form that still fails."""
        progress = True
        while progress:
            progress = any(self.accepts(walk) for walk in candidates(*self.best))


def _configs(config: Config, actions: list[Action]) -> Iterator[Walk]:
    for field, value in (
        ("optimizer", "sgd"), ("options", 0), ("groups", 1), ("max_norm", None), ("skip", True),
        ("masters", None), ("stochastic", False), ("bucket", None), ("steps", 1), ("steps", 2),
        ("backend", None), ("watches_skipped", False),
    ):  # fmt: skip
        if getattr(config, field) != value and not (field == "steps" and config.steps == 1):
            yield replace(config, **{field: value}), actions


def _params(config: Config, actions: list[Action]) -> Iterator[Walk]:
    params = config.params
    for i, spec in enumerate(params):
        rest = params[:i] + params[i + 1 :]
        if rest:
            groups = min(config.groups, len(rest))
            yield replace(config, params=rest, groups=groups), _renumbered(actions, i)
        for simpler in (ParamSpec(), replace(spec, shape=(3,), layout="contiguous", seed=0)):
            if simpler != spec:
                yield replace(config, params=(*params[:i], simpler, *params[i + 1 :])), actions


def _args(config: Config, actions: list[Action]) -> Iterator[Walk]:
    for i, action in enumerate(actions):
        for args in _simpler_args(action):
            yield config, [*actions[:i], Action(action.name, args), *actions[i + 1 :]]


def _renumbered(actions: list[Action], gone: int) -> list[Action]:
    """The same actions without parameter `gone`."""
    result = []
    for action in actions:
        if action.name in _SEEDED:
            action = Action(action.name, (_without(action.args[0], gone), *action.args[1:]))
        elif action.name == "weighted_backward":
            many = [_without(seeds, gone) for seeds in action.args[1]]
            action = Action(action.name, (action.args[0], many))
        result.append(action)
    return result


def _without(seeds: tuple[tuple[int, int], ...], gone: int) -> tuple[tuple[int, int], ...]:
    return tuple((i - (i > gone), seed) for i, seed in seeds if i != gone)


def _simpler_args(action: Action) -> Iterator[tuple[object, ...]]:
    if action.name in _SEEDED:
        seeds, *rest = action.args
        for i in range(len(seeds)):
            yield (seeds[:i] + seeds[i + 1 :], *rest)
    elif action.name == "weighted_backward" and len(action.args[1]) > 1:
        yield action.args[0], action.args[1][:1]
