"""Requests and answers of the API. Limits that are settings are checked by :mod:`~notellm2_ray.serve.http.checks`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from notellm2_ray.core.times import read_time

_TIME = "ISO 8601 with a time zone, or a number: s, ms, us or ns since 1970"

Id = Annotated[str, Field(min_length=1, max_length=1024, description="an id of the platform")]
Time = Annotated[datetime, BeforeValidator(read_time)]  # the rule by which tables are read


class Body(BaseModel):
    """Base of request bodies: unknown fields are errors, and values are not converted to other types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class NoteParts(Body):
    """What a note consists of."""

    title: str = ""
    topics: list[str] = []
    content: str = ""
    image: str | None = Field(None, description="the encoded image (JPEG, PNG, WebP, GIF, BMP, AVIF, TIFF) in base64")
    image_url: str | None = Field(None, max_length=2048, description="or its URL, on one of the listed hosts")
    created_at: Time | None = Field(None, description=_TIME, strict=False)

    @model_validator(mode="after")
    def _one_image(self) -> Self:
        if self.image is not None and self.image_url is not None:
            raise ValueError("give image or image_url, not both")
        return self


class Note(NoteParts):
    """A note to be written."""

    note_id: Id


class QueryNote(NoteParts):
    """A note that need not be stored: to embed it, or to find notes like it."""

    note_id: Id | None = Field(None, description="not needed; only named in messages")

    def named(self, name: str) -> Note:
        """The note with an id."""
        return Note.model_construct(**{**dict(self), "note_id": self.note_id or name})


class NoteCard(BaseModel):
    """A note for display."""

    note_id: str
    title: str
    topics: list[str]
    content: str
    has_image: bool
    created_at: datetime | None


class UpsertRequest(Body):
    notes: list[Note] = Field(min_length=1)


class Rejected(BaseModel):
    note_id: str
    reason: str


class UpsertAnswer(BaseModel):
    seq: int = Field(description="number of the commit with the notes; -1: none was written")
    upserted: int
    rejected: list[Rejected]


class DeleteRequest(Body):
    note_ids: list[Id] = Field(min_length=1)


class DeleteAnswer(BaseModel):
    seq: int
    deleted: int
    unknown: list[str]


class SearchRequest(Body):
    text: str = Field(min_length=1)
    limit: int = Field(20, ge=1, le=200)


class CardsAnswer(BaseModel):
    notes: list[NoteCard]


TOKEN_IDS = (
    "token ids of another tokenizer cannot be embedded: send texts (in LangChain's OpenAIEmbeddings, set "
    "check_embedding_ctx_length=False)"
)


class EmbeddingsRequest(BaseModel):
    """A request in OpenAI's format; fields that have no meaning here (user) are ignored."""

    input: str | list[str] | list[QueryNote] = Field(description="texts or notes; token ids are refused")
    model: str | None = Field(None, description='"notellm2", or the model\'s fingerprint')
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="one that the model was trained for; vectors are cut to it")

    @field_validator("input", mode="before")
    @classmethod
    def _no_token_ids(cls, value: Any) -> Any:
        # Otherwise the message would list why the ids are neither a text, nor texts, nor notes.
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, (int, list)):
            raise ValueError(TOKEN_IDS)
        return value


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Filter(Body):
    """Conditions on the results; all that are given must hold."""

    topics_any: list[str] = Field([], description="at least one of these topics")
    topics_all: list[str] = Field([], description="all of these topics")
    created_after: Time | None = Field(None, description="at this time or later", strict=False)
    created_before: Time | None = Field(None, description="before this time", strict=False)
    exclude: list[Id] = Field([], description="ids never to return")


Diversity = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        strict=False,
        description="maximal marginal relevance: each next result has the largest (1 - diversity) * relevance - "
        "diversity * its largest cosine with a result before it. Relevance is the score in similar notes, and in "
        "recommendations the place: 1 for the first candidate, falling evenly to 0",
    ),
]
FoldAbove = Annotated[
    float | None,
    Field(
        gt=0,
        le=1,
        strict=False,
        description="a result whose cosine with a better one is so large or larger is listed under that one's "
        "`duplicates`; one so near to the query or the history is no result. null: nothing is folded",
    ),
]


class SimilarRequest(Body):
    note_id: Id | None = None
    note: QueryNote | None = Field(None, description="or a note that need not be stored")
    k: int = Field(20, ge=1)
    filter: Filter | None = None
    diversity: Diversity = 0.0
    fold_above: FoldAbove = None
    explain: bool = Field(False, description="add cards, and separate cosines of images and texts if there are any")

    @model_validator(mode="after")
    def _one_query(self) -> SimilarRequest:
        if (self.note_id is None) == (self.note is None):
            raise ValueError("give either note_id or note")
        return self


class Similar(BaseModel):
    note_id: str
    score: float
    note: NoteCard | None = None
    by_modality: dict[Literal["image", "text"], float | None] | None = None
    duplicates: list[str] | None = Field(None, description="near duplicates that were folded into this result")


class IndexState(BaseModel):
    version: int = Field(description="number of the last commit in this replica's index")
    fresh: int = Field(description="notes added since the index was built; they are searched exactly")
    size: int


class SimilarAnswer(BaseModel):
    query: str | None
    results: list[Similar]
    duplicates: list[str] | None = Field(None, description="near duplicates of the query, if results are folded")
    index: IndexState


class Event(Body):
    event_id: Id | None = Field(
        None,
        description="an event with the id of an earlier one is a duplicate; null: derived from the other fields, "
        "then the timestamp is required",
    )
    user_id: Id
    note_id: Id
    timestamp: Time | None = Field(None, description=f"{_TIME}; null: now", strict=False)
    action: Annotated[str, Field(min_length=1, max_length=64)]
    session_id: Id | None = None
    request_id: Id | None = Field(None, description="of the recommendation that showed the note")

    @model_validator(mode="after")
    def _known_again(self) -> Event:
        # With neither, an event that is sent again after a broken connection would get a new time and count twice.
        if self.event_id is None and self.timestamp is None:
            raise ValueError("give event_id or timestamp: one is needed to recognise an event that is sent again")
        return self


class EventsRequest(Body):
    events: list[Event] = Field(min_length=1)


class RejectedEvent(BaseModel):
    index: int
    event_id: str | None
    reason: str


class EventsAnswer(BaseModel):
    accepted: int
    duplicates: int
    rejected: list[RejectedEvent]


class RecommendRequest(Body):
    user_id: Id | None = None
    history: list[Id] | None = Field(None, description="note ids, oldest first, for a user who is not stored here")
    k: int = Field(10, ge=1)
    budget_ms: float | None = Field(None, gt=0, le=60_000, strict=False)
    diversity: Diversity = 0.0
    fold_above: FoldAbove = None
    explain: bool = Field(False, description="add cards")

    @model_validator(mode="after")
    def _one_subject(self) -> RecommendRequest:
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give either user_id or history")
        return self


class Recommended(BaseModel):
    note_id: str
    score: float = Field(description="by recall: a weighted sum over the history's notes")
    p_yes: float | None = None
    from_history: list[str] = Field(description="notes of the history that it is similar to, strongest first")
    note: NoteCard | None = None
    duplicates: list[str] | None = Field(None, description="near duplicates that were folded into this result")


class RecommendAnswer(BaseModel):
    request_id: str
    arm: str
    preference: str | None = Field(description="the user's preference in words, which explains the results")
    ranked_by: Literal["ranker", "recall"]
    fallback: str | None = Field(description="why the ranker was not used; null if it was")
    results: list[Recommended]


class UserBlock(BaseModel):
    block: int
    notes: list[NoteCard]
    preference: str | None


class UserAnswer(BaseModel):
    user_id: str
    blocks: list[UserBlock]
    open_block: list[NoteCard]


class UsersAnswer(BaseModel):
    users: list[str]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    ready: bool
    reasons: list[str]
    parts: dict[str, bool] = Field(description="whether each part answers; ranker and preferences are not needed")


class ErrorDetail(BaseModel):
    type: str
    message: str
    param: str | None
    code: str | None = None


class ErrorAnswer(BaseModel):
    error: ErrorDetail


Stats = dict[str, Any]
