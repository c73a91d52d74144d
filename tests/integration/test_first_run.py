import json
import stat

import pytest
from django.contrib.auth import authenticate

from config.first_run import BUNDLED_MODEL, EMBEDDING_MODEL, credentials_path, prepare
from registry.actions.api_keys import revoke_api_key
from registry.actions.deployments import delete_deployment
from registry.actions.language_models import add_language_model, delete_language_model
from registry.models import ApiKey, Deployment, LanguageModel

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _own_data_folder(settings, tmp_path):
    settings.ROUNDHOUSE_DATA = tmp_path


def test_a_new_roundhouse_has_an_administrator_a_key_and_the_bundled_models():
    credentials, is_new = prepare(url="http://127.0.0.1:8000")
    assert is_new
    assert authenticate(username=credentials.admin_username, password=credentials.admin_password)
    assert ApiKey.objects.get().public_id in credentials.api_key
    chat, embedding = Deployment.objects.order_by("id")
    assert chat.name == credentials.chat_model == BUNDLED_MODEL
    assert embedding.name == credentials.embedding_model == EMBEDDING_MODEL
    assert embedding.engine == "embedding"
    assert json.loads(credentials_path().read_text())["base_url"] == "http://127.0.0.1:8000/v1"
    assert stat.S_IMODE(credentials_path().stat().st_mode) == 0o600


def test_a_second_start_keeps_everything_and_shows_no_password():
    first, _ = prepare(url="http://127.0.0.1:8000")
    second, is_new = prepare(url="http://127.0.0.1:9000")
    assert not is_new
    assert second.api_key == first.api_key
    assert second.admin_password == first.admin_password
    assert second.base_url == "http://127.0.0.1:9000/v1"


def test_what_a_person_deleted_does_not_come_back():
    prepare(url="http://127.0.0.1:8000")
    for deployment in Deployment.objects.all():
        delete_deployment(deployment=deployment, by="test")
    prepare(url="http://127.0.0.1:8000")
    assert not Deployment.objects.exists()


def _forget_the_embedding_model():
    """Credentials as a version wrote them that had no embedding model."""
    facts = json.loads(credentials_path().read_text())
    credentials_path().write_text(json.dumps(facts | {"embedding_model": None}))


def test_an_older_data_folder_gets_the_embedding_model_once():
    add_language_model(name=EMBEDDING_MODEL, source="/srv/taken", by="test")
    assert prepare(url="http://127.0.0.1:8000")[0].embedding_model is None
    delete_language_model(language_model=LanguageModel.objects.get(name=EMBEDDING_MODEL), by="test")
    assert prepare(url="http://127.0.0.1:8000")[0].embedding_model == EMBEDDING_MODEL

    delete_deployment(deployment=Deployment.objects.get(name=EMBEDDING_MODEL), by="test")
    delete_language_model(language_model=LanguageModel.objects.get(name=EMBEDDING_MODEL), by="test")
    _forget_the_embedding_model()
    assert prepare(url="http://127.0.0.1:8000")[0].embedding_model is None
    assert not Deployment.objects.filter(name=EMBEDDING_MODEL).exists()


def test_an_older_data_folder_without_its_chat_model_gets_no_embedding_model():
    prepare(url="http://127.0.0.1:8000")
    for deployment in Deployment.objects.all():
        delete_deployment(deployment=deployment, by="test")
    _forget_the_embedding_model()
    assert prepare(url="http://127.0.0.1:8000")[0].embedding_model is None


def test_a_revoked_first_key_is_replaced():
    first, _ = prepare(url="http://127.0.0.1:8000")
    revoke_api_key(api_key=ApiKey.objects.get(), by="test")
    second, _ = prepare(url="http://127.0.0.1:8000")
    assert second.api_key != first.api_key
    assert ApiKey.objects.count() == 2


def test_an_existing_administrator_keeps_the_password(django_user_model):
    django_user_model.objects.create_superuser("ada", password="her own")
    credentials, is_new = prepare(url="http://127.0.0.1:8000")
    assert not is_new
    assert credentials.admin_password is None
