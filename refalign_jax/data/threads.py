"""Calls in threads whose results come in the order of their arguments, a few of them ahead of the reader."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Value = TypeVar("Value")
Result = TypeVar("Result")


def in_order(call: Callable[[Value], Result], values: Iterable[Value], workers: int, ahead: int) -> Iterator[Result]:
    """Calls a function for each value.

    Args:
      call: the function.
      values: its arguments, taken in this thread.
      workers: number of threads.
      ahead: calls that are begun before their results are asked for.
    """
    pool = ThreadPoolExecutor(workers)
    waiting: collections.deque[Future[Result]] = collections.deque()
    try:
        for value in values:
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(call, value))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
