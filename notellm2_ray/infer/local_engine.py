"""A vLLM engine for CPUs that runs in its caller's process and has the methods of ``AsyncLLM`` that are used here.

``AsyncLLM`` keeps its engine in a second process. On a GPU both processes work while the device computes. On a CPU the
second process only takes cores from the first, imports everything again, and receives every token through a socket.
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
        arguments: for vLLM's ``EngineArgs``.
        threads: how many the model computes with.

    Raises:
        Exception: whatever vLLM raises while it loads the model.
    """

    def __init__(self, arguments: dict[str, Any], threads: int) -> None:
        # All of vLLM runs in one thread: it is not thread-safe, and OpenMP would keep a team of threads per caller.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._engine = self._thread.submit(_load, arguments, threads).result()
        self._waiting: list[_Request] = []
        self._running: dict[str, asyncio.Future[Any]] = {}
        self._unwanted: list[str] = []
        self._stepping: asyncio.Task[None] | None = None
        self._death: Exception | None = None

    async def generate(self, prompt: dict[str, Any], params: Any, request_id: str) -> AsyncIterator[Any]:
        """Yields one ``RequestOutput``, the finished one.

        Raises:
            ValueError, vllm.exceptions.VLLMValidationError: vLLM refuses the prompt.
            vllm.v1.engine.exceptions.EngineDeadError: the engine has failed.
        """
        await self.check_health()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Request(request_id, prompt, params, answer))
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._steps())
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
        """Forget all cached prompts. While requests are unfinished nothing is forgotten, and false is returned."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.reset_prefix_cache)

    def shutdown(self) -> None:
        """End the thread after its current step."""
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
            except Exception as error:  # any error leaves the engine in an unknown state
                self._die(error)
                return
            for name, refusal in refused.items():
                _answer(self._running.pop(name, None), refusal)
            for output in finished:
                _answer(self._running.pop(output.request_id, None), output)

    def _step(self, new: list[_Request], unwanted: list[str]) -> tuple[list[Any], dict[str, Exception]]:
        """One step, in the engine's thread: outputs of finished requests, and errors of refused ones by request."""
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

    # Ray may have started this process before its environment variables were known; this sets the threads in any case.
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
