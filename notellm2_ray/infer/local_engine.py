"""A vLLM engine in its caller's own process, for CPUs, behind the part of ``AsyncLLM``'s interface that is used here.

``AsyncLLM`` keeps its engine in a process of its own, which on a GPU overlaps with the device's work. On a CPU there is
nothing to overlap with: the second process takes the cores from the first, imports everything again, and every token
of every sequence is sent from the one to the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from notellm2_ray.core.memory import keep_freed_memory


class _Request(NamedTuple):
    name: str
    prompt: dict[str, Any]
    params: Any
    answer: asyncio.Future[Any]


class LocalEngine:
    """Runs ``vllm.v1.engine.llm_engine.LLMEngine`` in one thread; requests of one event loop share its batches.

    Args:
        arguments: of vLLM's ``EngineArgs``.
        threads: that the model computes with.

    Raises:
        Exception: whatever vLLM trips over while it loads the model.
    """

    def __init__(self, arguments: dict[str, Any], threads: int) -> None:
        # All of vLLM in one thread: it is not safe in several, and OpenMP would keep a team for each of them.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._engine = self._thread.submit(_load, arguments, threads).result()
        self._waiting: list[_Request] = []
        self._running: dict[str, asyncio.Future[Any]] = {}
        self._unwanted: list[str] = []
        self._pump: asyncio.Task[None] | None = None
        self._death: Exception | None = None

    async def generate(self, prompt: dict[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
        """Yields the finished ``RequestOutput`` alone, not what precedes it.

        Raises:
            ValueError, vllm.exceptions.VLLMValidationError: vLLM refuses the prompt.
            vllm.v1.engine.exceptions.EngineDeadError: the engine failed, now or earlier.
        """
        await self.check_health()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(request_id, prompt, params, answer))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._steps())
        try:
            yield await answer
        finally:
            if answer.cancelled() and self._running.pop(request_id, None) is not None:
                self._unwanted.append(request_id)

    async def check_health(self) -> None:
        """Raises ``EngineDeadError`` once a step has failed."""
        if self._death is not None:
            from vllm.v1.engine.exceptions import EngineDeadError

            raise EngineDeadError() from self._death

    async def reset_prefix_cache(self) -> bool:
        """Forget all prompts; false, and nothing forgotten, while requests are under way."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.reset_prefix_cache)

    def shutdown(self) -> None:
        """End the thread, once the step in hand is done."""
        self._thread.submit(self._engine.engine_core.shutdown)
        self._thread.shutdown(wait=False)

    async def _steps(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting or self._running or self._unwanted:
            new = [request for request in self._waiting if not request.answer.done()]
            unwanted, self._waiting, self._unwanted = self._unwanted, [], []
            self._running.update((request.name, request.answer) for request in new)
            try:
                finished, refused = await loop.run_in_executor(self._thread, self._step, new, unwanted)
            except Exception as error:  # whatever it is, the engine's state is not known any more
                self._die(error)
                return
            for name, refusal in refused.items():
                _answer(self._running.pop(name, None), refusal)
            for output in finished:
                _answer(self._running.pop(output.request_id, None), output)

    def _step(self, new: list[_Request], unwanted: list[str]) -> tuple[list[Any], dict[str, Exception]]:
        """In the engine's thread: outputs of requests that are finished, and errors of those that were refused."""
        from vllm.exceptions import VLLMValidationError

        refused: dict[str, Exception] = {}
        for request in new:
            try:
                self._engine.add_request(request.name, request.prompt, request.params)
            except (ValueError, VLLMValidationError) as error:
                refused[request.name] = error
        if unwanted:
            self._engine.abort_request(unwanted)
        return [output for output in self._engine.step() if output.finished], refused

    def _die(self, error: Exception) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        self._death = error
        answers = [*self._running.values(), *(request.answer for request in self._waiting)]
        self._running, self._waiting = {}, []
        for answer in answers:
            dead = EngineDeadError()
            dead.__cause__ = error
            _answer(answer, dead)


def _load(arguments: dict[str, Any], threads: int) -> Any:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    # The variables in the environment may have come too late for a process that Ray had started for something else.
    torch.set_num_threads(threads)
    keep_freed_memory()
    return LLMEngine.from_engine_args(EngineArgs(**arguments))


def _answer(future: asyncio.Future[Any] | None, answer: Any) -> None:
    if future is None or future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
