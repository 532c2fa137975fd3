"""One step of a preference chain, P_b = LLM(P_{b-1}, block b): the prompt, its budget, the call, the answer.

Bulk actors and serving replicas use the same code: each holds a :class:`PreferenceWriter` for its engine.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.prompts import Language, truncate
from notellm2_ray.core.recommend_prompts import Item, preference_prompt
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings import GenerationSettings, PreferenceSettings
from notellm2_ray.core.thoughts import without_thought
from notellm2_ray.infer.answers import cut_at_sentence, one_paragraph, unescaped, without_loop

if TYPE_CHECKING:
    from notellm2_ray.models.chat import ChatTokenizer

_CHARACTERS_PER_WORD = 20
_RETRY_TEMPERATURE = 0.7  # greedy decoding would give the same empty answer again


class PreferencePrompt(NamedTuple):
    """A prompt that fits the engine's context."""

    ids: list[int]
    dropped: int  # how many of the oldest items were left out


class StepResult(NamedTuple):
    """The result of a step."""

    preference: str  # "" if the model answered nothing and there is no previous preference
    prompt_tokens: int
    generated_tokens: int  # of all calls of the step
    calls: int  # 2 if the first answer was empty
    dropped: int  # how many of the oldest items did not fit into the prompt
    cut: bool  # the answer reached max_tokens and was cut after its last whole sentence
    problem: str | None  # why the previous preference was kept; None: there is a new one
    looped: bool = False  # the answer repeated itself; what it repeated was left out


class PreferenceWriter:
    """Makes preferences with one engine; any number of steps may run at once.

    Args:
        engine: of the model, from :func:`~notellm2_ray.infer.engine.start_engine`.
        tokenizer: of the same model.
        settings, generation, language: those of the stage.
        seed: of sampling; each step has a random stream of its own, named by its user and block.
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: ChatTokenizer,
        settings: PreferenceSettings,
        generation: GenerationSettings,
        language: Language,
        seed: int,
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.settings, self.language, self.seed = settings, language, seed
        self.room = generation.max_model_len - settings.max_tokens
        self._requests = 0
        self._name = f"preference-{uuid.uuid4().hex[:8]}"  # begins request ids, as others may share the engine
        if self.room < 1:
            raise ConfigError(
                f"generation.max_model_len={generation.max_model_len} leaves no room for a prompt beside "
                f"preferences.max_tokens={settings.max_tokens}: raise the first or lower the second"
            )

    async def advance(self, previous: str | None, items: Sequence[Item], *, user: str, block: int) -> StepResult:
        """The preference after a block.

        Args:
            previous: the preference before the block; None (or "") for the first one and for the variant ``direct``.
            items: the block's notes, oldest first; for ``direct`` the notes of the whole history.
            user, block: name the random stream of sampling.

        Raises:
            ConfigError: not even the instruction fits into the context.
        """
        prompt = self.prompt(previous or None, items)
        tokens = 0
        for attempt in (0, 1):
            output = await self._generate(
                prompt.ids, stream_seed(self.seed, "preference", user, block, attempt), attempt
            )
            tokens += len(output.token_ids)
            answer = one_paragraph(unescaped(without_thought(self.tokenizer.decode(output.token_ids))))
            cut = output.finish_reason == "length"
            if answer:
                # The next prompt shows this preference, and a model goes on with a loop that it is shown.
                text = without_loop(answer)
                looped = text != answer
                text = cut_at_sentence(text) if cut else text
                return StepResult(text, len(prompt.ids), tokens, attempt + 1, prompt.dropped, cut, None, looped)
        kept = "the previous preference was kept" if previous else "there is none to keep"
        problem = f"the model answered nothing, twice; {kept}"
        return StepResult(previous or "", len(prompt.ids), tokens, 2, prompt.dropped, False, problem)

    def prompt(self, previous: str | None, items: Sequence[Item]) -> PreferencePrompt:
        """The prompt of a step, cut to the engine's context.

        Titles and summaries are cut to the words that the settings allow. If the prompt is still too long, ``direct``
        leaves out the oldest items. The other variants cut the texts further, and leave out items only if that is not
        enough.

        Raises:
            ConfigError: not even the instruction fits.
        """
        if previous is not None:
            # An answer that is tokenised as text may take more tokens than when it was generated.
            previous = self.tokenizer.truncate(previous, max(1, min(self.settings.max_tokens, self.room // 2)))
        keep = min(1, len(items)) if self.settings.variant == "direct" else len(items)
        for scale, least in ((1, keep), (2, keep), (4, keep), (8, keep), (8, 0)):
            prompt = self._newest_that_fit(previous, items, scale, least)
            if prompt is not None:
                return prompt
        raise ConfigError(
            f"the preference prompt has no room for any note: generation.max_model_len minus preferences.max_tokens is "
            f"{self.room} tokens. Raise the first, lower the second or shorten preferences.template"
        )

    def _newest_that_fit(
        self, previous: str | None, items: Sequence[Item], scale: int, least: int
    ) -> PreferencePrompt | None:
        """A prompt of as many of the newest items as fit; None if even ``least`` of them do not."""

        def fitting(drop: int) -> list[int] | None:
            ids = self._ids(previous, items[drop:], scale)
            return ids if len(ids) <= self.room else None

        low, high = 0, len(items) - least  # how many of the oldest to drop
        best = fitting(high)
        while best is not None and low < high:
            middle = (low + high) // 2
            ids = fitting(middle)
            if ids is None:
                low = middle + 1
            else:
                best, high = ids, middle
        return None if best is None else PreferencePrompt(best, high)

    def _ids(self, previous: str | None, items: Sequence[Item], scale: int) -> list[int]:
        shown = list(shorten(items, self.settings, scale))
        parts = preference_prompt(self.language, self.settings.variant, previous, shown, self.settings.template)
        return self.tokenizer.prompt(parts)

    async def _generate(self, ids: list[int], seed: int, attempt: int) -> Any:
        from notellm2_ray.infer.engine import generate

        temperature = self.settings.temperature or (_RETRY_TEMPERATURE if attempt else 0.0)
        self._requests += 1
        return await generate(
            self.engine,
            ids,
            f"{self._name}-{self._requests}",
            max_tokens=self.settings.max_tokens,
            temperature=temperature,
            top_p=self.settings.top_p,
            seed=seed if temperature else None,
            stop_token_ids=self.tokenizer.end_ids,
            detokenize=False,  # token by token it would cost more than all else in the engine's front end
        )


def check_room(
    tokenizer: ChatTokenizer, settings: PreferenceSettings, generation: GenerationSettings, language: Language
) -> None:
    """Raise :class:`ConfigError` if no prompt fits into the context beside the longest preference; needs no engine."""
    writer = PreferenceWriter(None, tokenizer, settings, generation, language, 0)
    # Every word has at least one token; a longer preference is cut.
    writer.prompt(None if settings.variant == "direct" else "taste " * settings.max_tokens, [Item("note")])


def shorten(items: Sequence[Item], settings: PreferenceSettings, scale: int = 1) -> Iterator[Item]:
    """Items with titles and summaries cut to the words that the settings allow, divided by ``scale``."""
    for item in items:
        title = _cut(item.title, settings.max_title_words // scale)
        summary = item.image_summary
        yield Item(title, None if summary is None else _cut(summary, settings.max_summary_words // scale))


def _cut(text: str, words: int) -> str:
    # Text without spaces can be a single "word" of any length.
    words = max(1, words)
    return truncate(text, words, "auto")[: words * _CHARACTERS_PER_WORD]
