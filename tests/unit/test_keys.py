import re

from registry.keys import (
    KEY_PATTERN,
    digest_key,
    generate_key,
    generate_secret,
    mask_key,
    public_id_of,
    worker_secret,
)


def test_a_key_tells_its_public_id_and_nothing_else_does():
    key = generate_key()
    assert KEY_PATTERN.fullmatch(key.text)
    assert public_id_of(key.text) == key.public_id
    assert key.text.endswith(key.last4)


def test_a_mistyped_key_is_known_without_asking():
    text = generate_key().text
    for position in range(3, len(text)):
        other = "0" if text[position] != "0" else "1"
        mistyped = text[:position] + other + text[position + 1 :]
        assert public_id_of(mistyped) is None, position


def test_garbage_has_no_public_id():
    for text in ("", "sk-", "sk-" + "a" * 500, generate_key().text + "\n", "sk-é", "sk-abc-def"):
        assert public_id_of(text) is None


def test_keys_do_not_repeat_and_digests_depend_on_the_pepper():
    first, second = generate_key(), generate_key()
    assert first.text != second.text
    assert digest_key(first.text, b"a" * 32) != digest_key(first.text, b"b" * 32)


def test_a_masked_key_shows_almost_nothing():
    text = generate_key().text
    assert re.fullmatch(r"sk-..\*\*\*..", mask_key(text))
    assert mask_key("hunter2") == "***"


def test_a_join_token_can_be_pasted_behind_an_option():
    # `--join -abc` is refused by every command line.
    assert all(generate_secret().isalnum() for _ in range(200))


def test_each_epoch_has_a_secret_of_its_own():
    secrets = {worker_secret("k" * 50, worker, epoch) for worker in range(5) for epoch in range(5)}
    assert len(secrets) == 25
    assert worker_secret("other" * 10, 0, 0) not in secrets
