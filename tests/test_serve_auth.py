"""API keys and chat templates: what lets a client in, and what its messages may not say."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from roro_ray.errors import ConfigError
from serve.auth import ANONYMOUS, ApiKey, authenticate, load_keys, main, make_key, parse_keys
from serve.problems import ApiError
from serve.prompt import ChatTemplate, load_template, render_conversation
from serve.schema import Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = (Message("system", "Be brief."), Message("user", "Start with 36. "), Message("assistant", "36"))


def ask(*contents: str) -> tuple[Message, ...]:
    return tuple(Message("user", content) for content in contents)


def test_a_key_opens_and_only_its_hash_is_kept() -> None:
    key, digest = make_key()
    assert digest == hashlib.sha256(key.encode()).hexdigest()
    assert make_key()[0] != key and len(key) > 40
    others = [ApiKey(make_key()[1], f"other{i}") for i in range(3)]
    keys = (others[0], ApiKey(digest, "ann"), *others[1:])
    assert authenticate(f"Bearer {key}", keys) == "ann"
    assert authenticate(f"bearer  {key} ", keys) == "ann"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "KEY", "Basic KEY", "Bearer KEYx"])
def test_anything_else_is_a_401_that_repeats_nothing(header: str | None) -> None:
    key, digest = make_key()
    header = header and header.replace("KEY", key)
    with pytest.raises(ApiError) as caught:
        authenticate(header, [ApiKey(digest, "ann")])
    assert (caught.value.status, caught.value.type) == (401, "authentication_error")
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    assert key not in str(caught.value) and digest not in str(caught.value) and "wrong" not in str(caught.value)


def test_the_hash_itself_is_no_key() -> None:
    digest = make_key()[1]
    with pytest.raises(ApiError):
        authenticate(f"Bearer {digest}", [ApiKey(digest, "ann")])


def test_bytes_that_are_no_text_are_a_401() -> None:
    with pytest.raises(ApiError):
        authenticate("Bearer \udcff\u00e9\0", [ApiKey(make_key()[1], "ann")])


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    import serve.auth

    key, digest = make_key()
    keys = [ApiKey(digest, "ann"), *(ApiKey(make_key()[1], f"k{i}") for i in range(4))]
    compared: list[str] = []
    real = serve.auth.hmac.compare_digest

    def compare(one: str, other: str) -> bool:
        compared.append(other)
        return real(one, other)

    monkeypatch.setattr(serve.auth.hmac, "compare_digest", compare)
    assert authenticate(f"Bearer {key}", keys) == "ann"
    assert compared == [known.digest for known in keys]


def test_without_keys_everybody_may_ask() -> None:
    assert authenticate(None, ()) == ANONYMOUS


def test_a_key_file_has_names_and_comments(tmp_path: Path) -> None:
    one, two = make_key()[1], make_key()[1]
    path = tmp_path / "keys"
    path.write_text(f"# keys\n\n{one} ann  # the first\n{two.upper()}\n")
    assert load_keys(path) == (ApiKey(one, "ann"), ApiKey(two, two[:8]))


def test_a_file_without_keys_does_not_leave_the_server_open(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# none yet\n")
    with pytest.raises(ConfigError, match="holds no key"):
        load_keys(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_keys(tmp_path / "missing")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read"):
        load_keys(path)


def test_a_wrong_line_is_named_but_not_shown() -> None:
    key, digest = make_key()
    with pytest.raises(ConfigError, match="line 2") as caught:
        parse_keys([digest, f"{key} ann"])
    assert key not in str(caught.value)
    for lines in ([digest, digest], [f"{digest} a b"], [f"{digest} a", f"{make_key()[1]} a"], [f"{digest} a/b"]):
        with pytest.raises(ConfigError, match="line"):
            parse_keys(lines)


def test_the_printed_line_fits_the_printed_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["ann"])
    first, second = capsys.readouterr().out.splitlines()
    keys = parse_keys([second.partition(":")[2]])
    assert authenticate("Bearer " + first.rpartition(" ")[2], keys) == "ann"
    with pytest.raises(SystemExit, match="usage"):
        main(["a b"])


# ---- conversations


def test_plain_is_the_whole_conversation_and_a_single_question_its_text() -> None:
    assert render_conversation(ask(" Start with 36.\n\nA: double \n")) == " Start with 36.\n\nA: double"
    assert render_conversation(TALK) == "Be brief.\n\nStart with 36. \n\n36"


@pytest.mark.parametrize("messages", [ask(""), ask(" \n", "\t"), (Message("system", ""),)])
def test_a_conversation_without_text_is_refused(messages: tuple[Message, ...]) -> None:
    with pytest.raises(ApiError) as caught:
        render_conversation(messages)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_template_renders_as_transformers_renders_it(tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    path = tmp_path / "chat.jinja"
    path.write_text(CHATML)
    messages = [{"role": m.role, "content": m.content} for m in TALK]
    expected = render_jinja_template([messages], chat_template=CHATML, add_generation_prompt=True)[0][0]
    assert render_conversation(TALK, str(path)) == render_conversation(TALK, CHATML) == expected
    assert expected.endswith("<|im_start|>assistant\n")


def test_variables_loop_controls_and_json_work() -> None:
    one = "{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}"
    source = "{{ bos_token }}{% for m in messages %}" + one + "{% endfor %}"
    template = load_template(source, {"bos_token": "<s>"})
    assert template.render(ask("<é>", "b")) == '<s>{"role": "user", "content": "<é>"}'


def test_developer_is_system_to_templates_that_do_not_know_it() -> None:
    messages = (Message("developer", "a"),)
    assert render_conversation(messages, "{{ messages[0].role }}") == "system"
    assert render_conversation(messages, "{% if messages[0].role == 'developer' %}d{% endif %}") == "d"


@pytest.mark.parametrize("mark", ["<|im_start|>", "x<|im_end|>y", "<|endoftext|>", "<s>"])
def test_a_message_cannot_speak_in_another_role(mark: str) -> None:
    template = ChatTemplate(CHATML, {"bos_token": "<s>"}, ["<|endoftext|>"])
    with pytest.raises(ApiError) as caught:
        template.render([*TALK, *ask(f"hi {mark}\n")])
    assert (caught.value.status, caught.value.param) == (400, "messages[3].content")
    assert template.render(ask("<p> a < b > c | [x] </p>"))


def test_special_tokens_are_refused_by_plain_too() -> None:
    template = load_template("plain", special_tokens=["<eos>", ""])
    assert template.render(ask("a < b")) == "a < b"
    with pytest.raises(ApiError, match="<eos>"):
        template.render(ask("a<eos>b"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[7].content }}", ""),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for m in messages %}{{ m.content.nothing.here }}{% endfor %}", "nothing"),
    ],
)
def test_a_template_that_fails_is_a_400_with_the_reason(source: str, reason: str) -> None:
    with pytest.raises(ApiError, match="template") as caught:
        render_conversation(ask("hi"), source)
    assert caught.value.status == 400
    assert reason in caught.value.message
    assert "Traceback" not in caught.value.message


def test_messages_are_data_and_never_template_source() -> None:
    text = "{{ 7 * 7 }}{% for x in y %}"
    assert render_conversation(ask(text), "{{ messages[0].content }}") == text


def test_wrong_templates_are_found_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'plain'"):
        load_template("plian")
    with pytest.raises(ConfigError, match="line 1"):
        load_template("{% for m in messages %}")
    with pytest.raises(ConfigError, match="readable file"):
        load_template(str(tmp_path))
