"""`manage.py model`: a model fetched from a hub of our own, shown, verified and removed."""

from __future__ import annotations

import io
import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError, OutputWrapper
from django.utils import timezone

from config.bars import Bar
from inference.fleet import take_report
from inference.protocol import Cause, CopyPhase, CopyReport, DeletedCopy, NodeReport, Progress, UnwantedCopy
from inference.sizing import fit_in_words, read_facts, users_that_fit
from inference.sources import SourceError, parse_source
from inference.sources.cache import Slot, write_manifest
from inference.sources.prepare import slot_of
from registry import chat_templates
from registry.actions.language_models import record_copy
from registry.models import Event, LanguageModel, ModelCopy, Node
from registry.states import CopyState, NodeState
from tests.engines.test_hub_source import COMMIT, FakeHub, fake, llama
from tests.factories import make_deployment, make_language_model, make_node

__all__ = ["fake", "llama"]  # the fixtures, found by their names

pytestmark = pytest.mark.django_db

SOURCE = f"hub:acme/tiny@{COMMIT}"


def run(*arguments: str) -> tuple[str, str]:
    """What a command prints: its results, and what it tells meanwhile."""
    results, told = io.StringIO(), io.StringIO()
    call_command("model", *arguments, stdout=results, stderr=told)
    return results.getvalue(), told.getvalue()


def refusal(*arguments: str) -> CommandError:
    with pytest.raises(CommandError) as refused:
        run(*arguments)
    assert "\n" not in str(refused.value)
    return refused.value


@pytest.fixture
def cache(tmp_path: Path, settings: Any) -> Path:
    settings.ROUNDHOUSE_CACHE = tmp_path / "cache"
    return tmp_path / "cache"


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A model of its own, for a test that changes it."""
    return Path(shutil.copytree(llama, tmp_path / "mine"))


def without_template(folder: Path) -> None:
    about = json.loads((folder / "tokenizer_config.json").read_text())
    del about["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


# -- add


def test_a_model_is_fetched_with_its_progress_told_and_only_then_registered(fake: FakeHub, cache: Path):
    said, told = run("add", "tiny", "--source", SOURCE, "--fetch")
    assert "Added tiny." in said
    assert "of KV cache per token" in said
    assert "users ×" in said
    lines = told.splitlines()
    assert any("download the configuration, file 1 of" in line for line in lines), lines
    assert any(line.startswith("download, file 1 of 1, ") and "100 %" in line for line in lines), lines
    assert slot_of("tiny", parse_source(SOURCE), cache).path.is_dir()  # type: ignore[arg-type]
    assert LanguageModel.objects.get(name="tiny").source == SOURCE


def test_what_cannot_be_fetched_is_not_registered(fake: FakeHub, cache: Path):
    fake.flip = "model.safetensors"
    assert "digest differs" in str(refusal("add", "tiny", "--source", SOURCE, "--fetch"))
    assert not LanguageModel.objects.exists()


def test_what_the_form_refuses_is_said_before_anything_is_fetched(fake: FakeHub, cache: Path, tmp_path: Path):
    faulty = tmp_path / "faulty.jinja"
    faulty.write_text("{{ messages }}\n{% for %}")
    assert "name" in str(refusal("add", "bad name", "--source", SOURCE, "--fetch"))
    said = str(refusal("add", "tiny", "--source", SOURCE, "--fetch", "--chat-template", str(faulty)))
    assert "line 2" in said
    assert "vicuna" in str(refusal("add", "tiny", "--source", SOURCE, "--chat-template", "no-such"))
    assert fake.seen == []
    assert not LanguageModel.objects.exists()


def test_ctrl_c_ends_a_fetch_with_a_status_of_its_own(
    fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inference.sources.hub._is_whole", interrupted)
    error = refusal("add", "tiny", "--source", SOURCE, "--fetch")
    assert error.returncode == 130
    assert "goes on from there" in str(error)
    assert not LanguageModel.objects.exists()


def test_a_template_of_the_library_is_written_into_the_model_or_suggested(cache: Path, folder: Path):
    without_template(folder)
    said, _ = run("add", "my-vicuna", "--source", str(folder))
    assert "--chat-template vicuna fits its name" in said
    assert "none: it completes text but does not chat; vicuna fits" in run("show", "my-vicuna")[0]
    said, _ = run("add", "chatty", "--source", str(folder), "--chat-template", "vicuna")
    assert "does not chat" not in said
    assert LanguageModel.objects.get(name="chatty").chat_template == chat_templates.read("vicuna")
    assert "vicuna, of the library" in run("show", "chatty")[0]


@pytest.fixture
def bert(folder: Path) -> Path:
    """An embedding model's folder: its class has no head that writes, and no chat template."""
    without_template(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    return folder


def test_an_embedding_model_is_not_taken_for_one_that_writes(cache: Path, bert: Path):
    said, _ = run("add", "vectors", "--source", str(bert))
    assert "chat template" not in said
    assert "users" not in said
    said, _ = run("show", "vectors")
    assert "none: it writes no text" in said
    assert "free): fits" in said


def test_a_folder_whose_name_no_disk_takes_is_one_that_is_not_here(cache: Path):
    said, _ = run("add", "far", "--source", f"/{'x' * 300}")
    assert "no such folder" in said
    assert "not on this machine" in run("show", "far")[0]


# -- list and show


def test_list_tells_the_state_on_each_node_with_what_is_left(cache: Path):
    model = make_language_model(name="tiny")
    ready, fetching = make_node(name="ready"), make_node(name="slow")
    record_copy(node=ready, language_model_id=model.pk, state=CopyState.READY, size_bytes=93_200_000)
    amounts = {"step": "download", "total": 1000, "files_done": 1, "files_total": 3}
    record_copy(node=fetching, language_model_id=model.pk, state=CopyState.FETCHING, done=200, **amounts)
    record_copy(node=fetching, language_model_id=model.pk, state=CopyState.FETCHING, done=400, **amounts)
    # What was there before the step began is not speed: 200 in 10 s leave 30 s for 600.
    began = timezone.now() - timedelta(seconds=10)
    ModelCopy.objects.filter(node=fetching).update(step_began_at=began, updated_at=timezone.now())
    said, _ = run("list")
    assert "93.2 MB" in said
    assert "slow: download, file 2 of 3, 400 B of 1.0 kB, 40 %, 30 s left" in said
    (listed,) = json.loads(run("list", "--json")[0])
    assert listed["size_bytes"] == 93_200_000
    by_node = {copy["node"]: copy for copy in listed["copies"]}
    assert by_node["ready"]["state"] == "ready"
    assert by_node["slow"]["progress"]["seconds_left"] == pytest.approx(30, abs=1)


def test_what_an_agent_tells_of_its_files_is_noted(cache: Path):
    model, node = make_language_model(), make_node()
    progress = Progress(step="download", done=300, total=1000, files_done=1, files_total=3)
    told = CopyReport(model_id=model.pk, phase=CopyPhase.FETCHING, progress=progress)
    take_report(node, NodeReport(agent_pid=1, copies=[told]))
    copy = ModelCopy.objects.get()
    assert (copy.files_done, copy.files_total, copy.step_began_done) == (1, 3, 300)
    assert copy.step_began_at is not None


def test_a_new_step_is_timed_anew_and_an_end_has_nothing_left(cache: Path):
    model, node = make_language_model(), make_node()
    record_copy(
        node=node, language_model_id=model.pk, state=CopyState.FETCHING, step="download", done=9, total=10
    )
    record_copy(
        node=node, language_model_id=model.pk, state=CopyState.FETCHING, step="unpack", done=0, total=10
    )
    copy = ModelCopy.objects.get()
    assert (copy.step_began_done, copy.seconds_left) == (0, None)
    record_copy(node=node, language_model_id=model.pk, state=CopyState.READY, size_bytes=10)
    assert ModelCopy.objects.get().seconds_left is None


def test_show_tells_what_it_is_what_it_needs_and_whom_it_can_serve(cache: Path, folder: Path):
    (folder / "LICENSE").write_text("\n  Apache License\nVersion 2.0\n")
    run("add", "tiny", "--source", str(folder))
    make_node(name="box", state=NodeState.ONLINE, memory_bytes=2_000_000_000, memory_free_bytes=1_000_000_000)
    make_node(name="small", state=NodeState.ONLINE, memory_bytes=2_000_000, memory_free_bytes=1_000_000)
    make_node(name="gone", state=NodeState.OFFLINE, memory_bytes=1, memory_free_bytes=1)
    said, _ = run("show", "tiny")
    facts = read_facts(folder)
    for text in ("LlamaForCausalLM", "512 tokens", "Apache License", "for weights", "the model's own"):
        assert text in said
    assert "this machine (" in said
    assert "gone" not in said
    assert "small (1.0 MB of 2.0 MB free): does not fit" in said
    told = json.loads(run("show", "tiny", "--json")[0])
    assert told["here"]["weight_bytes"] == facts.need.weights
    box = next(place for place in told["fits"] if place["where"].startswith("node box"))
    users = (1_000_000_000 - facts.need.weights - facts.need.overhead) // (512 * facts.need.cache_per_token)
    assert box["users"] == {"512": users}
    assert f"{users:,} users × 512 tokens" in box["in_words"]
    wide = json.loads(run("show", "tiny", "--json", "--dtype", "float32")[0])
    assert wide["here"]["weight_bytes"] == 2 * told["here"]["weight_bytes"]


def test_as_many_users_fit_as_their_tokens_do(llama: Path):
    facts = read_facts(llama)
    least = facts.need.weights + facts.need.overhead
    assert fit_in_words(facts, least - 1) == "does not fit"
    one = least + 512 * facts.need.cache_per_token
    assert users_that_fit(facts, one) == {512: 1}
    assert fit_in_words(facts, one) == "1 user × 512 tokens"
    assert fit_in_words(facts, one - 1) == "the weights fit, but no conversation of 512 tokens beside them"


def test_a_model_that_is_elsewhere_or_damaged_is_shown_as_such(cache: Path, tmp_path: Path):
    make_language_model(name="far", source=SOURCE)
    assert "not on this machine" in run("show", "far")[0]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    make_language_model(name="cut", source=str(tmp_path / "cut"))
    assert "damaged on this machine: The model's folder has no config.json" in run("show", "cut")[0]


# -- verify


def test_verify_names_the_damaged_file_and_has_a_status_for_it(fake: FakeHub, cache: Path):
    run("add", "tiny", "--source", SOURCE, "--fetch")
    assert "each of" in run("verify", "tiny")[0]
    weights = slot_of("tiny", parse_source(SOURCE), cache).path / "model.safetensors"  # type: ignore[arg-type]
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    error = refusal("verify", "tiny")
    assert error.returncode == 3
    assert "model.safetensors" in str(error)
    assert "--repair" in str(error)
    results = io.StringIO()
    with pytest.raises(CommandError):
        call_command("model", "verify", "tiny", "--json", stdout=results, stderr=io.StringIO())
    assert json.loads(results.getvalue())["damaged"] == ["model.safetensors"]
    run("verify", "tiny", "--repair")
    assert weights.read_bytes() == content
    assert json.loads(run("verify", "tiny", "--json")[0])["whole"] is True


def test_a_folder_that_was_copied_is_hashed_too(cache: Path, llama: Path):
    _, told = run("add", "tiny", "--source", str(llama), "--copy")
    assert "copy, file" in told
    assert "has its digest" in run("verify", "tiny")[0]
    (cache / "imported" / "tiny" / "config.json").write_text("{}")
    error = refusal("verify", "tiny")
    assert (error.returncode, "config.json" in str(error)) == (3, True)
    assert "--repair" not in str(error), "it could not be made again"
    make_language_model(name="gone", source="/nowhere/at/all")
    assert refusal("verify", "gone").returncode == 3


def test_what_is_not_here_is_told_as_json_too(cache: Path):
    make_language_model(name="far", source=SOURCE)
    results = io.StringIO()
    with pytest.raises(CommandError) as refused:
        call_command("model", "verify", "far", "--json", stdout=results, stderr=io.StringIO())
    assert refused.value.returncode == 3
    told = json.loads(results.getvalue())
    assert told["whole"] is False
    assert "no copy of far" in told["problem"]


def test_what_another_server_has_is_not_damaged(cache: Path):
    make_language_model(name="theirs", source="upstream")
    error = refusal("verify", "theirs")
    assert (error.returncode, "another server" in str(error)) == (1, True)


# -- remove


def test_a_model_in_use_is_not_removed_and_its_deployments_are_named(cache: Path):
    model = make_language_model(name="tiny")
    make_deployment(name="first", language_model=model)
    make_deployment(name="second", language_model=model)
    assert "2 deployment(s) (first, second); delete them first" in str(refusal("remove", "tiny", "--yes"))


def test_remove_tells_what_it_leaves(fake: FakeHub, cache: Path):
    run("add", "tiny", "--source", SOURCE, "--fetch")
    node = make_node(name="far")
    record_copy(
        node=node,
        language_model_id=LanguageModel.objects.get().pk,
        state=CopyState.READY,
        size_bytes=93_200_000,
    )
    path = slot_of("tiny", parse_source(SOURCE), cache).path  # type: ignore[arg-type]
    said, _ = run("remove", "tiny", "--yes")
    assert f"stay, in {path}" in said
    assert f"Node far may still hold 93.2 MB in its cache, as models/{path.name}" in said
    assert path.is_dir()


def test_remove_with_its_files_has_the_nodes_delete_theirs(fake: FakeHub, cache: Path):
    run("add", "tiny", "--source", SOURCE, "--fetch")
    near, far, other = (make_node(name=name) for name in ("near", "far", "other"))
    model = LanguageModel.objects.get().pk
    for node in (near, far):
        record_copy(node=node, language_model_id=model, state=CopyState.READY, size_bytes=5)
    path = slot_of("tiny", parse_source(SOURCE), cache).path  # type: ignore[arg-type]
    said, _ = run("remove", "tiny", "--files", "--yes")
    assert "Node far deletes them when it is heard next." in said
    assert not path.exists()

    def orders(node: Node, **facts: Any) -> list[UnwantedCopy]:
        return take_report(node, NodeReport(agent_pid=1, **facts)).unwanted

    asked = [UnwantedCopy(name="tiny", source=SOURCE)]
    assert orders(near) == orders(near) == asked, "until it is done"
    assert orders(other) == []
    gone = DeletedCopy(name="tiny", source=SOURCE, freed_bytes=5)
    assert orders(other, deleted=[gone]) == [], "not its own"
    assert orders(near, deleted=[gone]) == orders(near, deleted=[gone]) == []
    [event] = Event.objects.filter(kind="node", what="files deleted")
    assert (event.object_id, event.by, event.data) == (near.pk, "agent near", {"freed_bytes": 5})
    assert "tiny" in event.reason

    assert orders(far) == asked
    run("add", "tiny", "--source", SOURCE)
    assert orders(far) == [], "it is wanted again"


def test_what_was_converted_from_a_folder_goes_and_the_folder_stays(cache: Path, tmp_path: Path):
    given = tmp_path / "given"
    given.mkdir()
    (given / "model.gguf").write_bytes(b"GGUF")
    made = [Slot(cache, "tiny", key * 16) for key in "ab"]
    for slot, source in zip(made, (given, "/another"), strict=True):
        slot.path.mkdir(parents=True)
        (slot.path / "config.json").write_text("{}")
        write_manifest(slot.path, key=slot.key, source=str(source), sha256="")
    make_language_model(name="tiny", source=str(given))
    said, _ = run("remove", "tiny", "--files", "--yes")
    assert f"Its folder {given} is yours and stays." in said
    assert "prepared files on this machine are deleted (2 B)" in said
    assert [slot.path.exists() for slot in made] == [False, True]
    assert (given / "model.gguf").exists()


def test_files_that_cannot_be_deleted_are_said_so(
    fake: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    run("add", "tiny", "--source", SOURCE, "--fetch")
    monkeypatch.setattr("inference.sources.cache.Slot.delete", refused)
    said, _ = run("remove", "tiny", "--files", "--yes")
    assert "cannot be deleted: Permission denied" in said


def test_a_node_that_had_nothing_to_delete_has_nothing_in_its_timeline(cache: Path):
    node = make_node()
    model = make_language_model(name="tiny", source="/srv/models/tiny")
    record_copy(node=node, language_model_id=model.pk, state=CopyState.READY, size_bytes=5)
    run("remove", "tiny", "--files", "--yes")
    gone = DeletedCopy(name="tiny", source="/srv/models/tiny", freed_bytes=0)
    assert take_report(node, NodeReport(agent_pid=1, deleted=[gone])).unwanted == []
    assert not Event.objects.filter(kind="node", what="files deleted").exists()


def test_files_that_stay_are_not_asked_for(cache: Path):
    node = make_node()
    model = make_language_model(name="tiny", source=SOURCE)
    record_copy(node=node, language_model_id=model.pk, state=CopyState.READY, size_bytes=5)
    run("remove", "tiny", "--yes")
    assert take_report(node, NodeReport(agent_pid=1)).unwanted == []


@pytest.mark.parametrize(("answer", "left"), [("", 1), ("no", 1), ("y", 0)])
def test_at_a_terminal_it_is_asked_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch, answer: str, left: int
):
    make_language_model(name="tiny")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    if left:
        assert "stays" in str(refusal("remove", "tiny"))
    else:
        run("remove", "tiny")
    assert LanguageModel.objects.count() == left


def test_ctrl_c_at_the_question_is_a_no(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(question: str) -> str:
        raise KeyboardInterrupt

    make_language_model(name="tiny")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", interrupted)
    assert "stays" in str(refusal("remove", "tiny"))


# -- the bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_the_bar_is_one_line_that_is_written_over():
    screen = Terminal()
    bar = Bar(OutputWrapper(screen))
    for done in (0, 500, 1000):
        bar.show(Progress(step="download", done=done, total=1000, files_done=0, files_total=2))
    bar.show(Progress(step="checksum"))
    bar.close()
    first, second, _ = screen.getvalue().split("\n")
    assert first.count("\r") == 3
    assert "[############............] download, file 1 of 2, 500 B of 1.0 kB, 50 %" in first
    assert second.strip() == "checksum"


def test_a_source_that_is_not_taken_any_more_does_not_break_the_list():
    make_language_model(name="old", source="bogus:x")
    assert "old" in run("list")[0]
    with pytest.raises(SourceError) as refused:
        parse_source("bogus:x")
    assert refused.value.cause == Cause.BAD_ARGUMENT
    assert "absolute folder" in run("show", "old")[0]
