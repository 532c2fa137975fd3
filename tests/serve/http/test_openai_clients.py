"""`/v1/embeddings` as the clients see it that people use for OpenAI's endpoint: OpenAI's own and LangChain's."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx2  # OpenAI's client is built on it
import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings.serve import LimitSettings, ServeSettings
from notellm2_ray.serve.deployments.loaded_model import Vectors
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.http.api import build_api
from notellm2_ray.serve.http.checks import Images

ADDRESS = {"base_url": "http://127.0.0.1/v1", "api_key": "none is needed on loopback"}


@pytest.fixture(scope="module")
def gateway(embedder):
    """A stand-in for a gateway that can embed."""
    encoder = embedder.encoder

    async def encode(notes, columns=("embedding",), model=""):
        assert model == encoder.fingerprint
        return Vectors({"embedding": encoder.encode(notes)}, {}, 3 * len(notes), model, (encoder.embedding_dim, 4))

    return SimpleNamespace(
        figures=Figures("test"),
        keys=None,
        settings=ServeSettings(),
        limits=LimitSettings(),
        fetcher=None,
        images=Images(LimitSettings()),
        index=SimpleNamespace(model_fingerprint=encoder.fingerprint, dim=encoder.embedding_dim),
        encode=encode,
    )


def asked(gateway, ask):
    """The result of ``ask(client)`` with an HTTP client of the gateway."""

    async def run():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(build_api(gateway))) as client:
            return await ask(client)

    return asyncio.run(run())


def create(gateway, **arguments):
    async def ask(client):
        embeddings = openai.AsyncOpenAI(**ADDRESS, http_client=client, max_retries=0).embeddings
        return await embeddings.create(**{"model": "notellm2", "input": "a green house", **arguments})

    return asked(gateway, ask)


@pytest.mark.parametrize("arguments", [{}, {"encoding_format": "float"}, {"dimensions": 16, "user": "ann"}])
def test_openais_client_gets_the_encoders_vectors(gateway, embedder, arguments):
    texts = ["a green house", "猫"]
    arguments = {**arguments, "dimensions": gateway.index.dim} if "dimensions" in arguments else arguments
    answer = create(gateway, input=texts, **arguments)
    expected = embedder.encoder.encode([Note("a", content=text) for text in texts])
    np.testing.assert_allclose([one.embedding for one in answer.data], expected, atol=1e-6)
    assert [one.index for one in answer.data] == [0, 1] and answer.usage.total_tokens == 6
    assert answer.model == embedder.encoder.fingerprint


def test_vectors_are_cut_to_a_length_that_the_model_was_trained_for(gateway, embedder):
    (answer,) = create(gateway, dimensions=4).data
    whole = embedder.encoder.encode([Note("a", content="a green house")])[0]
    np.testing.assert_allclose(answer.embedding, whole[:4] / np.linalg.norm(whole[:4]), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match=rf"the model has {len(whole)} or 4 dimensions"):
        create(gateway, dimensions=8)


@pytest.mark.parametrize(
    ("arguments", "param", "remedy"),
    [
        ({"input": [1, 2, 3]}, "input", "send texts"),
        ({"input": [[1, 2], [3]]}, "input", "check_embedding_ctx_length=False"),
        ({"input": ""}, "input.0", "leave it out"),
        ({"input": ["a cat", " \n"]}, "input.1", "leave it out"),
        ({"input": []}, "input", "at least one"),
        ({"dimensions": 7}, "dimensions", "leave dimensions out"),
        ({"model": "text-embedding-3-small"}, "model", "'notellm2'"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
    ],
)
def test_what_cannot_be_embedded_is_a_bad_request_that_says_what_to_do(gateway, arguments, param, remedy):
    with pytest.raises(openai.BadRequestError) as caught:
        create(gateway, **arguments)
    error = caught.value
    assert (error.status_code, error.type, error.param, error.code) == (400, "invalid_request_error", param, None)
    assert remedy in error.body["message"]


def test_langchains_embeddings_are_the_encoders(gateway, embedder):
    texts = ["a green house", "red cat"]

    def ask(client):
        model = OpenAIEmbeddings(
            **ADDRESS, model="notellm2", check_embedding_ctx_length=False, http_async_client=client, max_retries=0
        )
        return model.aembed_documents(texts)

    expected = embedder.encoder.encode([Note("a", content=text) for text in texts])
    np.testing.assert_allclose(asked(gateway, ask), expected, atol=1e-6)
