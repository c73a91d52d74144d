"""langchain-tests' standard suites on our server. Run by test_langchain.py with LangChain's own Python:
pytest does not collect this file by its name, and nothing of the project can be imported here."""

from __future__ import annotations

import os
from typing import Any

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests


class TestChat(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # Address and key come from OPENAI_BASE_URL and OPENAI_API_KEY.
        return {"model": os.environ["CHAT_MODEL"], "max_retries": 0, "stream_usage": True}

    @property
    def model_override_value(self) -> str:
        return os.environ["OTHER_CHAT_MODEL"]

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {
            "model": os.environ["EMBEDDING_MODEL"],
            "check_embedding_ctx_length": False,
            "max_retries": 0,
        }
