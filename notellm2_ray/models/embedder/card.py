"""The model card of an embedder: README.md in its directory, with the front matter of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from notellm2_ray import __version__
from notellm2_ray.core.config import shaping
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.models.embedder.kinds import kind_of

CARD_FILE = "README.md"
_OWN_MODELS = {
    "tiny": "a tiny model trained from scratch on the training notes",
    "packaged": "the tiny model that comes with notellm2-ray",
}
_TOLD_OF_MODEL = {"kind", "llm", "vision", "variant", "embedding_dim"}
_TOLD_OF_TRAINING = {"seed", "objective", "batch_pairs", "learning_rate", "precision"}
_EXAMPLES = {  # for NoteEncoder, and for sentence-transformers
    True: (
        'Note("a", title="Harbour at dawn", topics=("travel",), content="Boats leave early.")',
        '"boats in a harbour", {"title": "Harbour at dawn", "topics": ["travel"]}',
    ),
    False: ('Note("a", image=open("a.jpg", "rb").read())', '{"image": "a.jpg"}'),
}
_SERVICE = """
And over HTTP, from the service of the workspace that it was trained in (`notellm2 serve`), with OpenAI's client:

```python
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="KEY")
vectors = client.embeddings.create(model="notellm2", input=["boats in a harbour"])
```
"""
_SEEN = {"multimodal": "image, title, topics and text", "text": "title, topics and text", "image": "image"}


class CardFacts(NamedTuple):
    """What a card tells.

    Attributes:
        name: of the embedder, as in ``notellm2-seed42``.
        location: what loads it: its directory, or its repository on the hub.
        model: its settings.
        train: how it was trained; None: not at all.
        source: kind of the source of notes and events.
        notes: notes of the training and validation pairs.
        figures: of the training run: pairs, validation_pairs, steps, best_step, best_recall, learning_rate, final_loss.
    """

    name: str
    location: str
    model: ModelSettings
    train: TrainSettings | None
    source: str
    notes: int
    figures: Mapping[str, Any]


def write_card(directory: Path, facts: CardFacts) -> None:
    """Write the card into a model directory."""
    (directory / CARD_FILE).write_text(f"{_front_matter(facts)}\n{_text(facts)}", encoding="utf-8")


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    inputs = kind_of(facts.model).natural_inputs(facts.model)
    recall = facts.figures.get("best_recall")
    result: dict[str, Any] = {
        "task_type": "feature-extraction",
        "dataset_type": facts.source,
        "dataset_name": f"validation pairs of the source {facts.source}",
        "metric_type": "recall_at_10",
        "metric_name": "Recall@10",
    }
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=["sentence-transformers", "notellm2-ray", "recommendation", *(["multimodal"] * (inputs == "multimodal"))],
        base_model=[name for name in _base_models(facts.model).values() if _on_the_hub(name)] or None,
        model_name=facts.name,
        eval_results=None if recall is None else [EvalResult(metric_value=round(recall, 4), **result)],
    )
    return f"---\n{data.to_yaml().strip()}\n---\n"


def _text(facts: CardFacts) -> str:
    model, seen = facts.model, _SEEN[kind_of(facts.model).natural_inputs(facts.model)]
    language = "Chinese" if model.prompt_language == "zh" else "English"
    ours, theirs = _EXAMPLES["text" in seen]
    return f"""# {facts.name}
Turns a note ({seen}) into a vector of length one, so that notes which interest the same people lie
close together. Made with notellm2-ray {__version__}, after
[NoteLLM-2](https://doi.org/10.1145/3690624.3709440).

## Use
All ways give the same vectors up to rounding. Compare them by cosine.

```python
from notellm2_ray import Note, NoteEncoder

encoder = NoteEncoder.from_pretrained("{facts.location}")
vectors = encoder.encode([{ours}])
```
{_image_sentence(seen)}
With [sentence-transformers](https://sbert.net) 6, beside notellm2-ray:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{facts.location}", trust_remote_code=True)
vectors = model.encode([{theirs}])
```

It asks for `trust_remote_code` because the module's class is not its own. No code is downloaded: the class is that of
the installed notellm2-ray.
{_SERVICE if "text" in seen else ""}
## What it is made of
{_table(_parts(model))}

## Training
{_table(_training(facts))}

{_recall_sentence(facts)}

## Limits
- A title is cut after {model.max_title_words} words, a text after {model.max_content_words}, and the whole note after
  {model.max_body_tokens} tokens. Topics after the first {model.max_topics} are left out. The prompt is in {language}.
- Vectors of different models, or of this one trained again, cannot be compared.
- What is close follows from what the users of this source looked at together, with their habits and prejudices. Nothing
  was measured on other platforms, languages or times.

## Licence
notellm2-ray is under Apache 2.0. The weights come from the models above and from the training data: see the licences of
the base models, and the terms of the data.
"""


def _base_models(model: ModelSettings) -> dict[str, str]:
    """The pretrained models by part, ``llm`` and ``vision``."""
    return {part: getattr(model, part) for part in kind_of(model).parts(model)}


def _on_the_hub(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _parts(model: ModelSettings) -> dict[str, str]:
    titles = {"llm": "LLM", "vision": "vision encoder"}
    shown = {titles[part]: _OWN_MODELS.get(name, f"`{name}`") for part, name in _base_models(model).items()}
    kind = f"`{model.variant}`" if model.kind == "notellm2" else f"kind `{model.kind}`"
    numbers = "as many as the LLM's hidden state has" if model.embedding_dim is None else str(model.embedding_dim)
    return {**shown, "variant": kind, "numbers in a vector": numbers, **_changed(model, _TOLD_OF_MODEL)}


def _training(facts: CardFacts) -> dict[str, str]:
    train, figures = facts.train, facts.figures
    if train is None:
        return {"training": "none: the model before any training"}
    steps = f"{figures['steps']:,}, and the weights after step {figures['best_step']:,} are kept"
    rate = figures.get("learning_rate", train.learning_rate)
    return {
        "source of notes and events": f"`{facts.source}`",
        "pairs of related notes": f"{figures['pairs']:,}, and {figures['validation_pairs']:,} for validation",
        "notes of these pairs": f"{facts.notes:,}",
        "objective": f"`{train.objective}`",
        "pairs in a batch": str(train.batch_pairs),
        "steps": steps,
        "peak learning rate": "by the size of the pretrained models" if rate is None else f"{rate:g}",
        "precision": f"`{train.precision}`",
        "seed": str(train.seed),
        "loss of the last step": f"{figures['final_loss']:.4f}",
        **_changed(train, _TOLD_OF_TRAINING),
    }


def _changed(settings: BaseModel, told: Collection[str]) -> dict[str, str]:
    """The other settings that shape the model and are not at their defaults, as a row; none if there are none."""
    defaults = shaping(type(settings)())
    changed = {
        name: value for name, value in shaping(settings).items() if name not in told and value != defaults.get(name)
    }
    shown = ", ".join(f"`{name}={json.dumps(value, ensure_ascii=False)}`" for name, value in changed.items())
    return {"other settings": shown} if shown else {}


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _image_sentence(seen: str) -> str:
    return '\nAn image is `image=open("a.jpg", "rb").read()`.\n' if "image, " in seen else ""


def _recall_sentence(facts: CardFacts) -> str:
    recall = facts.figures.get("best_recall")
    if recall is None:
        return "Its recall was not measured in training."
    return (
        f"Validation Recall@10 is **{recall:.4f}**: the share of validation pairs whose target is among the ten\n"
        "nearest of all notes in these pairs. The weights were chosen by it, so it is a little too good; the report\n"
        "of the workspace has the recall of test pairs."
    )
