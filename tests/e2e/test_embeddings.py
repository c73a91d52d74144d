"""The embedding model that comes along, through the official client."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import openai
import pytest

from tests.e2e.conftest import Roundhouse, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model(roundhouse: Roundhouse) -> str:
    """`up` does not wait for it: this does."""
    name: str = roundhouse.credentials["embedding_model"]

    def answers() -> bool:
        try:
            roundhouse.client(max_retries=0).embeddings.create(model=name, input="Hello")
        except openai.APIError:
            return False
        return True

    eventually(answers, seconds=120, what=f"{name} answers {roundhouse.logs()}", every=0.25)
    return name


def test_king_is_nearer_to_queen_than_to_tractor(roundhouse: Roundhouse, model: str):
    answer = roundhouse.client().embeddings.create(model=model, input=["king", "queen", "tractor"])
    king, queen, tractor = (np.array(item.embedding) for item in answer.data)
    assert king @ queen > king @ tractor + 0.2
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 9


def test_float_and_base64_are_the_same_numbers(roundhouse: Roundhouse, model: str):
    client = roundhouse.client()
    spelled = client.embeddings.create(model=model, input="a king", encoding_format="float")
    packed = client.embeddings.create(model=model, input="a king", encoding_format="base64")
    text = packed.data[0].embedding
    assert isinstance(text, str)
    assert np.frombuffer(base64.b64decode(text), dtype="<f4").tolist() == spelled.data[0].embedding


def test_a_long_input_is_refused_unless_it_may_be_cut(roundhouse: Roundhouse, model: str):
    client = roundhouse.client()
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=model, input=["short", "long " * 400])
    assert refused.value.code == "context_length_exceeded"
    cut = client.embeddings.create(
        model=model, input=["short", "long " * 400], extra_body={"truncate_prompt_tokens": -1}
    )
    assert cut.usage.prompt_tokens == 3 + 256
    assert [(item.model_extra or {}).get("truncated") for item in cut.data] == [None, True]


def test_what_the_model_cannot_do_is_refused_by_name(roundhouse: Roundhouse, model: str):
    client = roundhouse.client()
    with pytest.raises(openai.BadRequestError) as dimensions:
        client.embeddings.create(model=model, input="a", dimensions=100)
    assert dimensions.value.param == "dimensions"
    with pytest.raises(openai.BadRequestError) as chat:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hello"}])
    assert chat.value.param == "model"


def test_the_best_document_comes_first_and_the_cost_is_in_the_ledger(roundhouse: Roundhouse, model: str):
    reply = httpx.post(
        f"{roundhouse.credentials['base_url']}/rerank",
        headers={"Authorization": f"Bearer {roundhouse.credentials['api_key']}"},
        json={
            "model": model,
            "query": "What is the capital of Japan?",
            "documents": ["Bananas are yellow.", "Tokyo is the capital of Japan.", "Trains run."],
            "top_n": 2,
            "return_documents": True,
        },
    )
    assert reply.status_code == 200, reply.text
    results = reply.json()["results"]
    assert results[0]["index"] == 1
    assert results[0]["document"]["text"] == "Tokyo is the capital of Japan."
    assert len(results) == 2
    rows = eventually(
        lambda: roundhouse.rows(
            "SELECT prompt_tokens, completion_tokens, outcome FROM registry_usageevent WHERE request_id = %s",
            reply.headers["x-request-id"],
        ),
        seconds=3,
        what="the event is in the ledger",
    )
    assert rows == [(reply.json()["usage"]["total_tokens"], 0, "ok")]
