"""S41: what people send never becomes SQL. Our sources build none, and none of the texts with which it is
tried changes a statement, costs one more, finds more than what it says letter by letter, or is a fault."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from django.contrib import admin
from django.contrib.auth import get_user_model
from django.db import connection
from django.db.backends.signals import connection_created
from django.test import Client

from openai_api.auth import KeyRing
from openai_api.errors import WrongKey
from registry.actions.events import record_event
from registry.actions.limits import save_limit
from registry.actions.own_keys import issue_own_key
from registry.actions.projects import set_role
from registry.actions.usage import record_usage
from registry.models import ApiKey, Limit, Project, Worker
from registry.querysets import database_now
from registry.rights import Role
from tests.api.conftest import ROUTE, Served, facts, say, served, worker  # noqa: F401 - fixtures
from tests.factories import make_api_key, make_budget, make_price, make_project, make_worker
from tests.usage import make_event
from webchat.models import Conversation, Message

ROOT = Path(__file__).resolve().parents[2]

# -- the lint

SOURCES = ("registry", "openai_api", "inference", "webchat", "platform/config", "manage.py")
PLAIN_SQL = "registry.statements"
NO_DATABASE = ("inference/engines/",)
"""Import-linter keeps Django out of there."""
BY_HAND = {"raw", "extra", "RawSQL", "RunSQL", "executescript"}
"""Ways to hand SQL to Django."""
NAMED = {
    *("filter", "exclude", "get", "Q", "annotate", "alias", "aggregate", "order_by", "values", "values_list"),
    *("update", "only", "defer", "distinct", "select_related", "prefetch_related", "dates", "datetimes"),
}
"""What takes names of columns: those must be ours."""

ALLOWED = {
    ("registry/querysets.py", "cursor"): "the database's clock, which no expression without a table asks",
    ("registry/spool.py", "cursor"): "PRAGMA synchronous, which belongs to the connection",
    ("registry/ledger_guard.py", "cursor"): "triggers, which no migration operation makes",
    ("registry/ledger_guard.py", "execute"): "made of constants and of our model's columns; while migrating",
    ("registry/statements.py", "cursor"): "the one place for plain SQL with values beside it",
    ("registry/statements.py", "execute"): "what its callers wrote out, and %s for each value",
    ("registry/threads.py", "cursor"): "how long a connection waits for locks",
    ("registry/threads.py", "execute"): "a number of ours: PRAGMA takes no parameters",
    ("registry/actions/budgets.py", "select"): "a constant, with FOR UPDATE or without",
    ("platform/config/doctor.py", "cursor"): "the version of the database, and SQLite's check of its file",
    ("registry/actions/notices.py", "update(**facts)"): "written out where it is called",
    ("registry/actions/budgets.py", "values(*fixed)"): "a list of columns three lines above",
    ("registry/actions/rollups.py", "values(*columns)"): "its caller's columns, all in the file",
    ("registry/actions/rollups.py", "annotate(**totals)"): "sums of our columns",
    ("registry/actions/workers.py", "update(**columns)"): "written out where it is called",
    ("registry/querysets.py", "Q(**)"): "one of three columns named in the function",
    ("registry/models/limit.py", "Q(**)"): "a constraint of the model",
    ("registry/models/price.py", "Q(**)"): "a constraint of the model",
    ("registry/migrations/0005_keys.py", "values_list(*names)"): "a list of columns six lines above",
    ("registry/reports.py", "filter(**)"): "one of four columns named above it",
    ("registry/reports.py", "Q(**)"): "the column of time that a part of the report names",
    ("registry/reports.py", "aggregate(**sums)"): "sums of our columns",
    ("registry/reports.py", "annotate(**names)"): "the greatest name of a dimension",
    ("registry/reports.py", "annotate(**sums)"): "sums of our columns",
    ("registry/reports.py", "values(*columns)"): "columns of the dimensions, an enum",
    ("registry/reports.py", "values_list(*columns)"): "columns of the dimensions, an enum",
    ("registry/reports.py", "values_list(*names)"): "their names, as annotated",
    ("registry/reports.py", "values_list(*sums)"): "our sums, as annotated",
    ("inference/fleet.py", "update(**facts)"): "written out above it",
    ("platform/config/management/commands/limit.py", "filter(**which)"): "a command's own options",
}
"""By file and what is done there: why it is safe. What is here and is done no more fails too."""


def found_in(source: str) -> Iterator[str]:
    """What a lint must be told the reason of."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    plain = {one.name for node in imports if node.module == PLAIN_SQL for one in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
        if name in BY_HAND or name == "cursor":
            yield name
        elif name in ("execute", "executemany") and node.args:
            # Redis' pipelines are executed without a word.
            if not (isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)):
                yield "execute"
        elif name in plain & {"select", "change", "insert"}:
            # Of `insert` the names of the columns: its first argument is a model.
            if not _written_out(node.args[1 if name == "insert" else 0]):
                yield name
        elif name in NAMED:
            starred = [("*", one.value) for one in node.args if isinstance(one, ast.Starred)]
            starred += [("**", one.value) for one in node.keywords if one.arg is None]
            if name in ("order_by", "values", "values_list"):
                starred += [("", one) for one in node.args if isinstance(one, ast.JoinedStr | ast.Name)]
            for star, value in starred:
                told = getattr(value, "id", "")
                # A constant holds what is written in the file.
                if not (star and told.isupper()):
                    yield f"{name}({star}{told})"


def _written_out(value: ast.expr) -> bool:
    """A constant, here or by its name."""
    if isinstance(value, ast.Tuple):
        return all(map(_written_out, value.elts))
    return isinstance(value, ast.Constant) or (isinstance(value, ast.Name) and value.id.isupper())


def everywhere() -> Iterator[tuple[str, str]]:
    for place in SOURCES:
        for file in [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py")):
            path = str(file.relative_to(ROOT))
            if not path.startswith(NO_DATABASE):
                for found in found_in(file.read_text()):
                    yield path, found


def test_our_sources_build_no_sql() -> None:
    found = set(everywhere())
    assert found - ALLOWED.keys() == set(), "say why it is safe, or do it another way"
    assert ALLOWED.keys() - found == set(), "done no more: the reason can go"


@pytest.mark.parametrize(
    "source",
    [
        "Key.objects.raw('SELECT 1')",
        "keys.extra(where=[text])",
        "RawSQL(text, [])",
        "migrations.RunSQL(text)",
        "cursor.execute(f'SELECT {text}')",
        "cursor.execute('SELECT %s' % text)",
        "cursor.execute('SELECT {}'.format(text))",
        "cursor.execute('SELECT ' + text, [])",
        "cursor.executemany(text, rows)",
        "connection.cursor()",
        "keys.filter(**request.GET)",
        "keys.filter(Q(**words))",
        "keys.order_by(*words)",
        "keys.order_by(word)",
        "keys.order_by(f'-{word}')",
        "keys.values_list(word)",
        "keys.annotate(**{word: Max('pk')})",
        "from registry.statements import select\nselect(f'SELECT 1 FROM {table}')",
        "from registry.statements import change\nchange(text, 1)",
        "from registry.statements import insert\ninsert(Hold, columns, rows)",
    ],
)
def test_the_lint_sees(source: str) -> None:
    assert list(found_in(source))


@pytest.mark.parametrize(
    "source",
    [
        "cursor.execute('SELECT 1', [x])",
        "pipeline.execute()",
        "keys.order_by('-pk').values(*NAMES)",
        "from registry.statements import insert, select\nselect(_BY_ID, text)\ninsert(Hold, ('id',), rows)",
    ],
)
def test_the_lint_lets_pass(source: str) -> None:
    assert not list(found_in(source))


# -- what is tried

TRIED = [
    *("'", "''", '"', "`", "\\", "\\'", "')", "'))", "';", "'--", "'/*", "'#", ";", "--", "/**/", "*", "()"),
    *("' OR '1'='1", "' OR 1=1--", '" OR ""="', "') OR ('1'='1", "1 OR 1=1", "1) OR (1=1", "admin'--"),
    *("' AND 1=0 UNION ALL SELECT NULL,NULL,NULL--", "1 UNION SELECT digest FROM registry_keysecret--"),
    *("'; DROP TABLE registry_apikey; --", "1; DELETE FROM registry_event", "'; COPY t TO PROGRAM 'id'--"),
    *("'; SELECT pg_sleep(9)--", "1 AND (SELECT 1 FROM pg_sleep(9))", "' || (SELECT version()) || '"),
    *("' AND LIKE('A',UPPER(HEX(RANDOMBLOB(99999999))))--", "1 AND CAST((SELECT 1) AS int)=1"),
    *("' AND extractvalue(1,concat(0x7e,version()))--", "CASE WHEN 1=1 THEN 1 ELSE 1/0 END", "-pk,(SELECT)"),
    *("%", "_", "%%", "%25", "%27%20OR%201=1", "%(name)s", "%s", "{0}", "$1", ":name", "?", "a%' ESCAPE 'a"),
    *("pk__gt", "owner__password__startswith", "project__name", "pk\", (SELECT 1) --", "x) FROM t; --"),
    *("_connector", "_negated", "__class__", "owner.password", "-1", "0", "1e309", "9" * 20, "NaN"),
    *("\x00", "a\x00b", "\x1a", "\n", "\u2019 OR 1=1", "\uff07 OR 1=1--", "\u0660", "\U0001f600", "\u202e"),
    *("0x27", "CHAR(39)", "N'x'", "E'\\x27'", "$$x$$", "ARRAY[1]", "{\"a\":1}", "$.a'", "a.b\" = 1 --"),
]  # fmt: skip
"""As sqlmap begins: quotes of every kind, conditions, unions, second statements, waits, errors, comments,
wildcards, placeholders, names of columns, numbers that are none, and what databases refuse as text."""
FEW = ["'", "' OR 1=1--", "1; DROP TABLE registry_apikey", "%", "_", "\\", "\x00", "9" * 20, "pk__gt"]
corpus = pytest.mark.parametrize(
    "tried", [pytest.param(FEW, id="few"), pytest.param(TRIED, id="all", marks=pytest.mark.full)]
)


class Statements(list[str]):
    """Every statement, without what it is parametrised with."""

    def __call__(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        self.append(sql)
        return execute(sql, params, many, context)

    def hold(self, text: str) -> list[str]:
        # One sign is in many an innocent statement, too.
        return [sql for sql in self if len(text) > 7 and text in sql]


@contextmanager
def watched(*, threads: bool = False) -> Iterator[Statements]:
    """What this thread asks the database, or with `threads` what those do that connect from now on."""
    asked = Statements()
    if not threads:
        with connection.execute_wrapper(asked):
            yield asked
        return

    def join(connection: Any, **_: Any) -> None:
        connection.execute_wrappers.append(asked)

    connection_created.connect(join)
    try:
        yield asked
    finally:
        connection_created.disconnect(join)


def answered(send: Callable[[str], Any], tried: list[str], *innocent: str) -> Iterator[tuple[str, Any]]:
    """The answers to `tried`, after seeing that none took more statements than the dearest of `innocent`."""
    most = 0
    for text in innocent:
        # The first fills what is cached.
        send(text)
        with watched() as usual:
            send(text)
        most = max(most, len(usual))
    for text in tried:
        with watched() as asked:
            answer = send(text)
        assert answer.status_code < 500, (text, answer.content)
        assert not asked.hold(text), text
        assert len(asked) <= most, (text, asked)
        yield text, answer


# -- who is there


class People:
    """ann has a key in one project, ben has one in another, and each used theirs."""

    def __init__(self) -> None:
        self.start = database_now()
        self.ann, self.ben = (get_user_model().objects.create_user(name) for name in ("ann", "ben"))
        self.project, self.others = make_project(name="ann's"), make_project(name="foreign")
        set_role(project=self.project, user=self.ann, role=Role.OWNER, by="test")
        set_role(project=self.others, user=self.ben, role=Role.OWNER, by="test")
        self.key, self.text = issue_own_key(user=self.ann, project=self.project, name="hers")
        self.foreign, _ = issue_own_key(user=self.ben, project=self.others, name="foreign")
        for key in (self.key, self.foreign):
            record_usage(
                [
                    make_event(
                        started_at=self.start,
                        project_id=key.project_id,
                        project_name=key.project.name,
                        key_public_id=key.public_id,
                        key_name=key.name,
                        route="shared" if key is self.key else "foreign-route",
                        prompt_tokens=7,
                    )
                ]
            )
        self.client = Client(headers={"host": "localhost"})
        self.client.force_login(self.ann)


@pytest.fixture
def people(db: None) -> People:
    return People()


def is_only_anns(people: People, answer: Any) -> None:
    told = answer.content.decode()
    assert people.foreign.public_id not in told
    assert "foreign" not in told


# -- keys and models


@pytest.mark.django_db
def test_no_text_for_a_key_reaches_the_database(people: People) -> None:
    client = Client(headers={"host": "localhost"})
    public_id, secret = people.text[3:15], people.text[16:]
    for text in TRIED:
        for key in (
            text,
            f"sk-{text}-{secret}",
            f"sk-{public_id}-{text}",
            people.text + text,
            text + people.text,
        ):
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}, {"api-key": key}):
                with watched() as asked:
                    answer = client.get("/v1/models", headers=headers)
                assert answer.status_code == 401, (headers, answer.content)
                assert asked == [], headers


async def test_no_text_for_a_key_makes_a_gateway_ask() -> None:
    ring = KeyRing({1: b"x" * 32}, away_seconds=lambda: 0.0, load=lambda text: pytest.fail(text))
    for text in TRIED:
        with pytest.raises(WrongKey):
            await ring.authenticate(text)


@pytest.mark.django_db(transaction=True)
def test_keys_and_models_over_the_socket(request: pytest.FixtureRequest) -> None:
    with watched(threads=True) as asked:
        served: Served = request.getfixturevalue("served")
        assert served.chat(say("hi", max_tokens=1)).status == 200
        assert any("registry_apikey" in sql for sql in asked), "its threads are watched"
        usual = len([sql for sql in asked if "registry_apikey" in sql])
        for text in TRIED:
            sent = quote(text, safe="!#$&'()*+/:;=?@[],\" ")
            assert served.chat(say("hi"), key=sent).status == 401, text
            assert served.chat(say("hi"), f"x-api-key: {sent}", key=None).status == 401, text
            for body in ({"messages": say("hi")["messages"]}, {"prompt": "hi"}, {"input": "hi"}):
                path = {"messages": "chat/completions", "prompt": "completions", "input": "embeddings"}[
                    next(iter(body))
                ]
                answer = served.request("POST", f"/v1/{path}", json.dumps(body | {"model": text}).encode())
                assert answer.status in (400, 404), (text, answer.body)
            answer = served.request("GET", f"/v1/models/{quote(text, safe='')}")
            assert answer.status in (400, 404), (text, answer.body)
            named = served.request("GET", f"/v1/responses/{quote(text, safe='')}")
            assert named.status in (400, 404), (text, named.body)
        assert served.chat(say("hi", max_tokens=1)).status == 200
        assert [text for text in TRIED if asked.hold(text)] == []
        # `last_used_at` and the like: not for each of hundreds.
        assert len([sql for sql in asked if "registry_apikey" in sql]) <= usual + 5
        assert not ApiKey.objects.filter(revoked_at__isnull=False).exists()


# -- usage, by API

USAGE = "/v1/organization/usage/completions"
NARROWING_WORDS = ("project_ids", "api_key_ids", "user_ids", "models")
OTHER_WORDS = ("group_by", "bucket_width", "page", "limit", "start_time", "end_time", "batch")


@pytest.mark.django_db
@pytest.mark.parametrize(
    "path", [USAGE, USAGE.replace("completions", "embeddings"), "/v1/organization/costs"]
)
@corpus
def test_words_of_the_usage_api(people: People, path: str, tried: list[str]) -> None:
    client = Client(headers={"host": "localhost", "authorization": f"Bearer {people.text}"})
    whole = {"start_time": int(people.start.timestamp()) - 60, "group_by": "project_id,api_key_id"}

    def figures(answer: Any) -> list[dict[str, Any]]:
        return [result for bucket in answer.json()["data"] for result in bucket["results"]]

    innocent = {"group_by": "api_key_id", "bucket_width": "1d", "limit": "5", "batch": "false"}
    innocent |= {"start_time": str(whole["start_time"]), "end_time": str(whole["start_time"] + 999)}
    for word in (*NARROWING_WORDS, *OTHER_WORDS):

        def send(text: str, word: str = word) -> Any:
            return client.get(f"{path}?{urlencode(whole | {word: text})}")

        usual = innocent.get(word, "page_1" if word == "page" else "nothing")
        for text, answer in answered(send, tried, usual):
            assert answer.status_code in (200, 400), (word, text)
            is_only_anns(people, answer)
            if answer.status_code == 200 and word in NARROWING_WORDS and text.strip(","):
                assert figures(answer) == [], (word, text)


# -- the usage page

PAGE_WORDS = ("project", "user", "key", "model", "endpoint", "status", "zone", "width", "split", "format")
PAGE_WORDS += ("view", "after", "from", "to")


@pytest.mark.django_db
@pytest.mark.parametrize(
    "words", [{}, {"format": "csv"}, {"view": "requests"}], ids=["page", "csv", "requests"]
)
@corpus
def test_filters_of_the_usage_page(people: People, words: dict[str, str], tried: list[str]) -> None:
    innocent = {"project": "5", "status": "429", "zone": "Europe/Vienna", "split": "key", "width": "hour"}
    innocent |= {"from": f"{people.start:%Y-%m-%d}", "to": f"{people.start:%Y-%m-%d}", "after": "5_5"}
    innocent |= {"key": people.key.public_id, "user": "ann"}
    for word in PAGE_WORDS:

        def send(text: str, word: str = word) -> Any:
            answer = people.client.get(f"/usage/?{urlencode(words | {word: text})}")
            if answer.streaming:
                b"".join(answer)
            return answer

        # Nothing is innocent as well, and white space is nothing: the zone is then the project's.
        for text, answer in answered(send, tried, innocent.get(word, ""), ""):
            assert answer.status_code in (200, 400, 404), (word, text)
            if not answer.streaming:
                is_only_anns(people, answer)


@pytest.mark.django_db
def test_filters_of_the_usage_page_find_what_they_name(people: People) -> None:
    for word in ("model", "endpoint"):
        for text in ["%", "_", "shar%", "s_ared", "' OR 1=1--"]:
            answer = people.client.get("/usage/", {word: text, "format": "json"})
            told = json.loads(b"".join(answer))  # type: ignore[call-overload]
            assert told["rows"] == [], (word, text)
    answer = people.client.get("/usage/", {"model": "shared", "format": "json"})
    assert json.loads(b"".join(answer))["rows"], "the innocent word finds it"  # type: ignore[call-overload]


# -- /api/v1/


def sent(client: Client, path: str, body: Any) -> Any:
    return client.post(f"/api/v1/{path}", json.dumps(body), content_type="application/json")


@pytest.mark.django_db
@pytest.mark.parametrize("word", ["project", "limit", "after", "order_by"])
@corpus
def test_words_of_the_list_of_keys(people: People, word: str, tried: list[str]) -> None:
    innocent = {"project": str(people.project.pk), "limit": "5", "after": people.key.public_id}

    def send(text: str) -> Any:
        return people.client.get("/api/v1/keys", {word: text})

    for text, answer in answered(send, tried, innocent.get(word, "")):
        assert answer.status_code == (404 if word == "after" else 400), (text, answer.content)
        is_only_anns(people, answer)


@pytest.mark.django_db
@corpus
def test_ids_in_addresses(people: People, tried: list[str]) -> None:
    for shape in (
        "/api/v1/keys/{}",
        "/keys/{}/",
        "/keys/{}/secrets/",
        "/chat/{}/",
        "/chat/api/conversations/{}",
    ):

        def send(text: str, shape: str = shape) -> Any:
            return people.client.get(shape.format(quote(text, safe="")))

        for text, answer in answered(send, tried, people.key.public_id):
            assert answer.status_code in (404, 400), (shape, text, answer.content)
            is_only_anns(people, answer)


FIELDS: dict[str, Callable[[str], Any]] = {
    "name": str,
    "project": str,
    "priority": str,
    "expires_at": str,
    "routes": lambda text: [text],
    "scopes": lambda text: [text],
    "addresses": lambda text: [text],
    "metadata": lambda text: {text: text},
}


@pytest.mark.django_db
@pytest.mark.parametrize("field", FIELDS)
@corpus
def test_fields_of_a_new_key(people: People, field: str, tried: list[str]) -> None:
    innocent = {"priority": "default", "expires_at": "2999-01-01", "scopes": "chat", "addresses": "10.0.0.1"}

    def send(text: str) -> Any:
        return sent(
            people.client,
            "keys",
            {"name": "new", "project": people.project.pk} | {field: FIELDS[field](text)},
        )

    for text, answer in answered(send, tried, innocent.get(field, "innocent")):
        assert answer.status_code in (201, 400), (text, answer.content)
        if answer.status_code == 201:
            kept = answer.json()
            # What was taken is kept letter by letter.
            assert kept[field] == FIELDS[field](text), text
            assert kept["owner"] == "ann"
        is_only_anns(people, answer)
    assert ApiKey.objects.filter(owner=people.ben).count() == 1


@pytest.mark.django_db
def test_words_of_what_ends_a_key(people: People) -> None:
    for call, body in (("rotate", "overlap_seconds"), ("revoke", "reason")):
        for text in TRIED:
            answer = sent(people.client, f"keys/{people.key.public_id}/{call}", {body: text})
            assert answer.status_code in (200, 400, 409), (text, answer.content)
    assert ApiKey.objects.get(pk=people.foreign.pk).revoked_at is None


# -- the chat's search


@pytest.mark.django_db
def test_the_search_of_conversations(people: People) -> None:
    def talk(user: Any, title: str) -> None:
        conversation = Conversation.objects.create(user=user, title=title)
        Message.objects.create(conversation=conversation, position=0, role="user", content=f"about {title}")

    for title in ("100 %", "a_b", "back\\slash", "it's", "plain"):
        talk(people.ann, title)
    talk(people.ben, "foreign 100 % a_b it's")

    def send(text: str) -> Any:
        return people.client.get("/chat/api/conversations", {"q": text})

    for text, answer in answered(send, TRIED, "plain"):
        assert answer.status_code == 200, text
        is_only_anns(people, answer)
    for text, titles in {
        "%": ["100 %"],
        "_": ["a_b"],
        "a_b": ["a_b"],
        "a%b": [],
        "p_ain": [],
        "\\": ["back\\slash"],
        "'": ["it's"],
    }.items():
        found = [one["title"] for one in send(text).json()["conversations"]]
        assert found == titles, text


# -- the admin's lists


@pytest.fixture
def operator(people: People) -> Client:
    client = Client(headers={"host": "localhost"})
    client.force_login(get_user_model().objects.create_superuser("olga", password="x"))
    make_worker()
    make_price("shared")
    make_budget(limit=5, subject=people.key.public_id)
    save_limit(limit=Limit(amount=5, metric="requests", per="hour", route="shared"), by="test")
    record_event(people.key, "tested", by="test")
    return client


LISTS = [model for model in admin.site._registry if model._meta.app_label in ("registry", "auth")]


def page(model: Any) -> str:
    return f"/admin/{model._meta.app_label}/{model._meta.model_name}/"


def words_of(model: Any) -> list[str]:
    """What its list may be asked."""
    told = ["q", "o", "p", "pk__in"]
    for one in admin.site._registry[model].list_filter:
        name = one if isinstance(one, str) else one.parameter_name  # type: ignore[union-attr]
        told += [f"{name}__exact", name, f"{name}__gte"]
    if when := admin.site._registry[model].date_hierarchy:
        told += [f"{when}__{part}" for part in ("year", "month", "day")]
    return told


@pytest.mark.parametrize("model", LISTS, ids=lambda model: model.__name__)
@corpus
def test_search_filters_and_order_of_the_admins_lists(operator: Client, model: Any, tried: list[str]) -> None:
    for at, word in enumerate(words_of(model)):

        def send(text: str, word: str = word) -> Any:
            return operator.get(page(model), {word: text} if text else {})

        # The whole list, a word that changes it, a search that finds all of it.
        these = tried if tried is TRIED or word == "q" else tried[at % 3 :: 3]
        for text, answer in answered(send, these, "", "1", '""'):
            assert answer.status_code in (200, 302, 400), (word, text)
            if word == "q" and "1=1" in text:
                assert answer.context["cl"].result_count == 0, text


@pytest.mark.django_db
def test_searching_for_wildcards_finds_them_alone(operator: Client, people: People) -> None:
    for name in ("100% sure", "under_score", "back\\slash", "it's"):
        make_api_key(name=name, project=people.project)
        record_usage(
            [
                make_event(
                    started_at=people.start,
                    key_name=name,
                    request_id=f"req_{name[:3]}",
                    project_name="x",
                    route="y",
                )
            ]
        )
        Project.objects.create(name=name)
        Worker.objects.filter(pk=make_worker().pk).update(state_reason=name)
    for text, name in {
        "100%": "100% sure",
        "under_": "under_score",
        "back\\": "back\\slash",
        "it'": "it's",
    }.items():
        for model in ("apikey", "usageevent", "project", "worker"):
            found = operator.get(f"/admin/registry/{model}/", {"q": text}).context["cl"].result_list
            assert [name in vars(one).values() for one in found] == [True], (model, text)
    for text in ("1%0", "1_0%", "_nder", "%", "it%"):
        for model in ("apikey", "project"):
            found = operator.get(f"/admin/registry/{model}/", {"q": text}).context["cl"].result_list
            wanted = "100% sure" if text == "%" and model == "project" else None
            assert [getattr(one, "name", None) for one in found] == ([wanted] if wanted else []), (
                model,
                text,
            )
