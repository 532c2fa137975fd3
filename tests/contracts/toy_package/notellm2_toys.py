"""An example of another package, with a minimal kind of embedder and a minimal objective."""

import zlib
from typing import NamedTuple

import torch
from torch import nn

from notellm2_ray.models.embedder.kinds import EmbedderKind
from notellm2_ray.models.embedder.vectors import NOTE, NoteVectors


class Words(NamedTuple):
    note_id: str
    codes: list
    num_tokens: int


class WordBatch(NamedTuple):
    codes: torch.Tensor
    starts: torch.Tensor

    def to(self, device, non_blocking=False):
        return WordBatch(*(tensor.to(device) for tensor in self))


class Preprocessor:
    def __init__(self, settings):
        self.settings = settings

    def features(self, note, inputs="multimodal"):
        codes = [zlib.crc32(word.encode()) % 997 for word in f"{note.title} {note.content}".split()] or [0]
        return Words(note.note_id, codes, len(codes))

    def collate(self, features):
        lengths = torch.tensor([0, *(one.num_tokens for one in features)])
        return WordBatch(torch.tensor([code for one in features for code in one.codes]), lengths.cumsum(0)[:-1])


class BagOfWords(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.words = nn.EmbeddingBag(997, settings.embedding_dim)
        self.scale = nn.Parameter(torch.ones(1, 1) * settings.options.get("scale", 1.0))
        self.temperature = nn.Parameter(torch.full((1,), settings.start_temperature))

    def forward(self, batch):
        vectors = self.words(batch.codes, batch.starts) * self.scale
        return NoteVectors({NOTE: vectors.float()}, {}, self.temperature.squeeze().clone())

    def to_precision(self, precision):
        return self.float()

    def is_fresh(self, name):
        return True

    def set_gradient_checkpointing(self, enabled):
        pass


def make(settings, seed=0, *_):
    torch.manual_seed(seed)
    return BagOfWords(settings), Preprocessor(settings)


KIND = EmbedderKind(
    build=make,
    config=lambda network: {},
    describe=lambda network, preprocessor, directory: None,
    load=lambda settings, values, directory, attention: make(settings),
    parts=lambda settings: (),
    natural_inputs=lambda settings: "text",
)


def pull_together(model, train):
    """The distance between a query and its target."""

    def loss(vectors, note_keys, gather=None):
        query, target = nn.functional.normalize(vectors.multimodal, dim=-1).chunk(2)
        return (query - target).square().sum(dim=-1).mean() * vectors.temperature.exp() / vectors.temperature.exp()

    return loss
