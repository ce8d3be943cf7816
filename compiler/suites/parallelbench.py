"""The list tasks of ParallelBench (papers/38), their metrics, and what independent draws from exact marginals score on them in closed form.

Tokens that are committed in one pass are drawn from marginals. On copy, reverse, sort and the tasks that name a place nothing depends on another
slot, so one pass can be perfect; on shuffle and on the tasks that choose a place at random every slot depends on every other, and what is lost by
committing several at once can be computed. A task is a list of words in and a list of words out, so any tokenizer will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import factorial, log, log1p, prod

import numpy as np

ITEMS = tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN")  #: what lists are made of; sorted in this order
DIGITS = tuple("01234")  #: what is summed
MODULUS = len(DIGITS)
LONGEST = 12  #: items of the longest list that a prompt can hold
ANSWER_AT = LONGEST  #: slot of the sign in front of the answer of `trace`
NOTHING, ANSWER, SEPARATOR = "_", "=", "|"

Words = tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A prompt (task, two arguments, list), the answer of the deterministic tasks, or one of the answers of the others."""

    task: str
    arguments: tuple[str, str]
    items: Words
    answer: Words

    @property
    def prompt(self) -> str:
        """As text: `reverse _ _ a b c`."""
        return " ".join((self.task, *self.arguments, *self.items))


@dataclass(frozen=True)
class Task:
    """How examples are made and answers judged. `lengths` are those of the lists, both ends included."""

    name: str
    make: Callable[[np.random.Generator, int], Example]
    valid: Callable[[Example, Sequence[str]], bool]
    deterministic: bool = True
    lengths: tuple[int, int] = (3, 8)

    def example(self, rng: np.random.Generator, length: int | None = None) -> Example:
        """A random example, of a random length unless told."""
        low, high = self.lengths
        return self.make(rng, int(rng.integers(low, high + 1)) if length is None else length)


TASKS: dict[str, Task] = {}


def _exact(example: Example, words: Sequence[str]) -> bool:
    return tuple(words) == example.answer


def _place(index: int) -> str:
    return f"#{index}"


def _pick(rng: np.random.Generator, count: int) -> list[str]:
    return [ITEMS[i] for i in rng.permutation(len(ITEMS))[:count]]


def _task(
    name: str,
    change: Callable[[np.random.Generator, list[str], str], tuple[tuple[str, str], list[str]]],
    valid: Callable[[Example, Sequence[str]], bool] = _exact,
    lengths: tuple[int, int] = (3, 8),
) -> None:
    """A task over distinct items; `change` is given one item more, which is not in the list."""

    def make(rng: np.random.Generator, length: int) -> Example:
        *items, other = _pick(rng, length + 1)
        arguments, answer = change(rng, items, other)
        return Example(name, arguments, tuple(items), tuple(answer))

    TASKS[name] = Task(name, make, valid, valid is _exact, lengths)


def _at(rng: np.random.Generator, items: Sequence[str], more: int = 0) -> int:
    return int(rng.integers(len(items) + more))


def _inserted(example: Example, words: Sequence[str]) -> bool:
    """Without the new item, once, it is the list."""
    words, new = list(words), example.arguments[1]
    return words.count(new) == 1 and tuple(w for w in words if w != new) == example.items


def _removed(example: Example, words: Sequence[str]) -> bool:
    """The list without one of its items."""
    return any(tuple(words) == example.items[:i] + example.items[i + 1 :] for i in range(len(example.items)))


def _replaced(example: Example, words: Sequence[str]) -> bool:
    """The list with the new item in one of its places."""
    new = example.arguments[1]
    return any(tuple(words) == (*example.items[:i], new, *example.items[i + 1 :]) for i in range(len(example.items)))


def _shuffled(example: Example, words: Sequence[str]) -> bool:
    """A permutation, and another one than the list itself."""
    return sorted(words) == sorted(example.items) and tuple(words) != example.items


def _shuffle(rng: np.random.Generator, items: list[str], other: str) -> tuple[tuple[str, str], list[str]]:
    while True:
        mixed = [items[i] for i in rng.permutation(len(items))]
        if mixed != items:
            return (NOTHING, NOTHING), mixed


_task("copy", lambda rng, x, new: ((NOTHING, NOTHING), x))
_task("reverse", lambda rng, x, new: ((NOTHING, NOTHING), x[::-1]))
_task("sort", lambda rng, x, new: ((NOTHING, NOTHING), sorted(x, key=ITEMS.index)))
_task("insert_index", lambda rng, x, new: ((_place(i := _at(rng, x, 1)), new), [*x[:i], new, *x[i:]]))
_task("insert_random", lambda rng, x, new: ((NOTHING, new), [*x[: (i := _at(rng, x, 1))], new, *x[i:]]), _inserted)
_task("remove_index", lambda rng, x, new: ((_place(i := _at(rng, x)), NOTHING), [*x[:i], *x[i + 1 :]]))
_task("remove_random", lambda rng, x, new: ((NOTHING, NOTHING), [*x[: (i := _at(rng, x))], *x[i + 1 :]]), _removed)
_task("replace_index", lambda rng, x, new: ((_place(i := _at(rng, x)), new), [*x[:i], new, *x[i + 1 :]]))
_task("replace_random", lambda rng, x, new: ((NOTHING, new), [*x[: (i := _at(rng, x))], new, *x[i + 1 :]]), _replaced)
_task("shuffle", _shuffle, _shuffled)


def _running(digits: Sequence[str]) -> list[str]:
    return [DIGITS[i % MODULUS] for i in np.cumsum([int(d) for d in digits])]


def _sum(rng: np.random.Generator, length: int) -> Example:
    """The running sum: every slot depends on the one before it, so that steps matter on a task with one right answer."""
    digits = tuple(DIGITS[i] for i in rng.integers(MODULUS, size=length))
    return Example("sum", (NOTHING, NOTHING), digits, tuple(_running(digits)))


def _trace(rng: np.random.Generator, length: int) -> Example:
    """The running sum and then, at a fixed place, the largest digit, which can be told without the sum: an easy answer behind a slow trace."""
    digits = tuple(DIGITS[i] for i in rng.integers(MODULUS, size=length))
    trace = (*_running(digits), *[NOTHING] * (ANSWER_AT - length))
    return Example("trace", (NOTHING, NOTHING), digits, (*trace, ANSWER, max(digits)))


TASKS["sum"] = Task("sum", _sum, _exact)
TASKS["trace"] = Task("trace", _trace, _exact)

#: The ten of the benchmark; `sum` and `trace` are ours.
WAITING_LINE = (
    "copy",
    "insert_index",
    "insert_random",
    "remove_index",
    "remove_random",
    "replace_index",
    "replace_random",
    "reverse",
    "shuffle",
    "sort",
)


# ---- closed forms: probability that draws from exact marginals at temperature 1 are valid ------------------------------------------


def shuffle_valid(groups: Sequence[int], *, different: bool = False) -> float:
    """Of a permutation when `groups` slots are committed together, in a random order; `different`: of one that is not the list itself.

    The latter is exact for one group, and for groups of one where every permutation is as likely as another.
    """
    left, chance = sum(groups), 1.0
    for size in groups:
        chance *= factorial(left) / factorial(left - size) / left**size
        left -= size
    return chance * (1.0 - 1.0 / factorial(sum(groups))) if different else chance


def replace_random_valid(groups: Sequence[int]) -> float:
    """Of the list with the new item in exactly one place, committed in groups."""
    lefts = [sum(groups[i:]) for i in range(len(groups))]
    return sum(
        prod((1 - 1 / lefts[h]) ** groups[h] for h in range(g)) * m * (1 / lefts[g]) * (1 - 1 / lefts[g]) ** (m - 1)
        for g, m in enumerate(groups)
    )


def insert_random_valid(n: int) -> float:
    """Of an insertion into n items, all slots at once."""
    whole = factorial(n)
    return sum(whole // factorial(n - k) * (whole // factorial(k)) for k in range(n + 1)) / (n + 1.0) ** (n + 1)


def remove_random_valid(n: int) -> float:
    """Of a removal from n items, all slots at once."""
    whole = factorial(n - 1)
    return sum(whole // factorial(n - 1 - k) * (whole // factorial(k)) for k in range(n)) / float(n) ** (n - 1)


def shuffle_correlation(n: int) -> float:
    """Total correlation of a uniform permutation of n items, in nats: the divergence that one pass cannot get below."""
    return n * log(n) - log(factorial(n))


def replace_random_correlation(n: int) -> float:
    """The same of a replacement at one of n places."""
    p = 1.0 / n
    return n * -(p * log(p) + (1 - p) * log1p(-p)) - log(n) if n > 1 else 0.0


def marginals(example: Example, known: Sequence[str | None]) -> list[dict[str, float]]:
    """Exact conditional marginals of every slot of `shuffle` and `replace_random`, given the words already committed (None: not yet).

    A slot that is committed has its word for certain. Where what was committed cannot be completed any more, the words that are left over
    stay equally likely, so that an invalid answer stays invalid.
    """
    left = [i for i, word in enumerate(known) if word is None]
    table: list[dict[str, float]] = [{} if word is None else {word: 1.0} for word in known]
    if example.task == "shuffle":
        rest = [word for word in example.items if word not in known]
        for i in left:
            table[i] = {word: 1.0 / len(rest) for word in rest}
    elif example.task == "replace_random":
        new = example.arguments[1]
        share = 0.0 if new in known else 1.0 / max(1, len(left))
        for i in left:
            table[i] = {word: p for word, p in ((new, share), (example.items[i], 1.0 - share)) if p > 0}
    else:
        raise ValueError(f"no marginals of {example.task}")
    return table


def orders(n: int, size: int) -> list[int]:
    """Group sizes when n slots are committed `size` at a time."""
    return [size] * (n // size) + ([n % size] if n % size else [])
