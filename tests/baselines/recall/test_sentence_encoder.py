"""The row of a ready sentence encoder."""

import numpy as np
import pytest

from notellm2_ray.baselines.recall.sentence_encoder import sentence_vectors
from notellm2_ray.core.errors import ModelError
from tests.support import tiny_models

pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    home = tmp_path_factory.mktemp("sentence")
    words = Transformer(str(tiny_models.save_llm(home / "llm")))
    SentenceTransformer(modules=[words, Pooling(words.get_word_embedding_dimension())]).save(str(home / "encoder"))
    return home / "encoder"


def test_vectors_are_those_of_the_model_in_the_order_of_the_texts(model):
    from sentence_transformers import SentenceTransformer

    texts = ["a red house", "blue boats", "a red house", ""]
    vectors = sentence_vectors(str(model), texts)
    expected = SentenceTransformer(str(model)).encode(texts, normalize_embeddings=True)
    assert np.allclose(vectors, expected, atol=1e-5) and (vectors[0] == vectors[2]).all()
    assert np.allclose(np.linalg.norm(vectors[:3], axis=1), 1, atol=1e-5)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match="has no config.json"):
        sentence_vectors(str(tmp_path), ["a"])
