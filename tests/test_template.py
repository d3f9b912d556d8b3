from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from front_fixtures import GLM_TEMPLATE, POCKET, picture, reference_tokenizer

from autoglm_edge.errors import BundleError, PromptError
from autoglm_edge.runtime.prompt.messages import read_messages
from autoglm_edge.runtime.prompt.template import ChatTemplate

IMAGE_TOKENS = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
PLACEHOLDER = "".join(IMAGE_TOKENS)
TOKENS = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
IMAGE = {"type": "image", "image": picture(8, 8)}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "string": [{"role": "user", "content": "hi"}],
    "part": [{"role": "user", "content": [text("hi\n")]}],
    "system": [{"role": "system", "content": "Today is Friday.\n"}, {"role": "user", "content": " hi "}],
    "image": [{"role": "user", "content": [IMAGE, text("tap it")]}],
    "text first": [{"role": "user", "content": [text("look: "), IMAGE, text(" and "), IMAGE, text("?")]}],
    "images only": [{"role": "user", "content": [IMAGE, IMAGE]}],
    "turns": [
        {"role": "system", "content": "系统"},
        {"role": "user", "content": [text('打开京东\n\n{"current_app": "System Home"}')]},
        {
            "role": "assistant",
            "content": '<think><think>好</think>\n<answer></think><answer>do(action="Back")</answer>',
        },
        {"role": "user", "content": [IMAGE, text("** Screen Info **\n\n{}")]},
    ],
    "html": [{"role": "user", "content": "<b>&amp; 'quotes' \"double\" {{ messages }} {% raw %}</b>"}],
    "empty": [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": []},
    ],
}
TEMPLATES = {
    "pocket": (POCKET / "chat_template.jinja").read_text(encoding="utf-8"),
    "glm": GLM_TEMPLATE,
    "blocks": """
    {% for m in messages %}
        {# a comment #}
        {% if m.content is string %}
[{{ loop.index }}/{{ m.role | upper }}] {{ m.content | trim }}
        {% else %}
            {% for p in m['content'] if p['type'] == 'text' or 'image' in p %}
{{ p.text if p.type == 'text' else '<|begin_of_image|><|image|><|end_of_image|>' }}
            {% endfor %}
        {% endif %}
    {% endfor %}
{{ eos_token }}{{ bos_token }}{{ pad_token is defined }}{{ tools is none }}{{ documents is defined }}
""",
    "tools of the trade": """
{%- set ns = namespace(seen=0, last='') -%}
{%- for m in messages -%}
  {%- if m.content is not string and m.role == 'user' -%}
    {%- for p in m.content if p.type == 'image' -%}<|begin_of_image|><|image|><|end_of_image|>{%- endfor -%}
    {%- continue -%}
  {%- endif -%}
  {%- set ns.seen = ns.seen + 1 -%}{%- set ns.last = m.content -%}
  {%- generation -%}
    {{ m.content | tojson }}{{ {'text': m.content, 'n': [1, 2.5, none, true]} | tojson(indent=2) }}
  {%- endgeneration -%}
  {%- if ns.seen > 5 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{{ ns.seen }} {{ ns.last[:3] }} {{ strftime_now('%Y') }} {{ dict(a=1) | tojson }} {{ range(3) | list }}
{%- if add_generation_prompt %}>{% endif -%}
""",
}


def reference(template: str, conversation: list[dict[str, Any]], **options: Any) -> str:
    rendered: str = reference_tokenizer().apply_chat_template(
        conversation, chat_template=template, tokenize=False, **options
    )
    return rendered


def render(template: str, conversation: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate(template, TOKENS).render(
        read_messages(conversation), image_tokens=IMAGE_TOKENS, **options
    )


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_text_equals_that_of_transformers(
    template: str, conversation: str, add_generation_prompt: bool
) -> None:
    options = {"add_generation_prompt": add_generation_prompt}
    own = render(TEMPLATES[template], CONVERSATIONS[conversation], **options)
    assert own == reference(TEMPLATES[template], CONVERSATIONS[conversation], **options)


def test_variables_reach_the_template_as_in_transformers() -> None:
    template = "{{ enable_thinking }}{{ words | join('/') }}{{ missing is defined }}{{ eos_token }}"
    variables = {"enable_thinking": False, "words": ["a", "b"], "eos_token": "!"}
    hello = CONVERSATIONS["string"]
    assert (
        render(template, hello, variables=variables)
        == reference(template, hello, **variables)
        == "Falsea/bFalse!"
    )


def test_named_tokens_of_the_folder_are_those_of_transformers() -> None:
    assert ChatTemplate.from_folder(POCKET).tokens == reference_tokenizer().special_tokens_map


def test_an_image_url_is_shown_to_the_template_as_an_image(tmp_path: Path) -> None:
    path = tmp_path / "shot.png"
    picture(8, 8).save(path)
    parts = [{"type": "image_url", "image_url": {"url": str(path)}}, text("tap")]
    assert render(GLM_TEMPLATE, [{"role": "user", "content": parts}]) == render(
        GLM_TEMPLATE, [{"role": "user", "content": [IMAGE, text("tap")]}]
    )


def test_the_plain_layout_has_no_newline_after_an_image() -> None:
    assert render(GLM_TEMPLATE, CONVERSATIONS["image"]) == (
        f"[gMASK]<sop><|user|>\n{PLACEHOLDER}tap it<|assistant|>\n"
    )


@pytest.mark.parametrize(
    ("content", "body"),
    [
        ("tap", "tap"),
        ([text("tap")], "tap"),
        ([IMAGE, text("tap")], f"{PLACEHOLDER}\ntap"),
        ([text("tap"), IMAGE], f"{PLACEHOLDER}\ntap"),
        ([IMAGE, text("a"), IMAGE, text("b")], f"{PLACEHOLDER}\n{PLACEHOLDER}\na\nb"),
        ([IMAGE], PLACEHOLDER),
        ([], ""),
    ],
    ids=["string", "text", "image text", "text image", "mixed", "image", "nothing"],
)
def test_the_newline_layout_puts_images_first_and_joins_with_newlines(content: Any, body: str) -> None:
    rendered = render(GLM_TEMPLATE, [{"role": "user", "content": content}], image_layout="newline")
    assert rendered == f"[gMASK]<sop><|user|>\n{body}<|assistant|>\n"


def test_the_layouts_give_the_same_text_without_images() -> None:
    for name in ("string", "part", "system", "html"):
        assert render(GLM_TEMPLATE, CONVERSATIONS[name]) == render(
            GLM_TEMPLATE, CONVERSATIONS[name], image_layout="newline"
        )


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_text_parts_of_system_and_assistant_are_printed_as_text(role: str) -> None:
    parts = [{"role": role, "content": [text("one "), text("two")]}, {"role": "user", "content": "hi"}]
    string = [{"role": role, "content": "one two"}, {"role": "user", "content": "hi"}]
    assert render(GLM_TEMPLATE, parts) == render(GLM_TEMPLATE, string)


def test_an_image_that_the_template_drops_is_an_error() -> None:
    only_text = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    with pytest.raises(PromptError, match="0 image placeholders of 1 images"):
        render(only_text, CONVERSATIONS["image"])


def test_an_image_in_a_system_message_is_an_error_where_the_template_cannot_show_it() -> None:
    conversation = [{"role": "system", "content": [IMAGE, text("a")]}, {"role": "user", "content": "hi"}]
    with pytest.raises(PromptError, match="0 image placeholders of 1 images"):
        render(GLM_TEMPLATE, conversation)


def test_an_image_that_the_template_doubles_is_an_error() -> None:
    with pytest.raises(PromptError, match="2 image placeholders of 1 images"):
        render(GLM_TEMPLATE + PLACEHOLDER, CONVERSATIONS["image"])


def test_a_placeholder_without_any_image_is_an_error() -> None:
    with pytest.raises(PromptError, match="1 image placeholders of 0 images"):
        render(GLM_TEMPLATE + PLACEHOLDER, CONVERSATIONS["string"])


def test_images_need_the_text_of_their_tokens() -> None:
    with pytest.raises(PromptError, match="not given"):
        ChatTemplate(GLM_TEMPLATE, {}).render(read_messages(CONVERSATIONS["image"]))


def test_what_a_template_raises_reaches_the_user() -> None:
    with pytest.raises(PromptError, match="refuses the messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", CONVERSATIONS["string"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content / 2 }}",
        "{{ 1 // 0 }}",
        "{{ messages[5].content }}",
        "{{ nothing.at.all }}",
        "{{ messages | tojson(indent='x') | length / 'a' }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 'a' * 10 ** 12 }}",
        "{{ 10 ** 12 * [1] }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{% include 'etc/passwd' %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ (messages | map(attribute='__class__') | first).__name__ }}",
    ],
)
def test_a_failing_or_hostile_template_is_a_prompt_error(template: str) -> None:
    with pytest.raises(PromptError, match="the chat template"):
        render(template, CONVERSATIONS["string"])


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ a", "{% generation %}", "{% endfor %}", "{{ a | nofilter }}"]
)
def test_a_template_with_a_syntax_error_is_refused_with_its_line(template: str) -> None:
    with pytest.raises(PromptError, match="syntax error in line 2"):
        ChatTemplate("\n" + template, {})


def test_a_variable_cannot_replace_the_messages() -> None:
    with pytest.raises(PromptError, match="'messages'"):
        render(GLM_TEMPLATE, CONVERSATIONS["string"], variables={"messages": []})


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(PromptError, match="plain, newline"):
        render(GLM_TEMPLATE, CONVERSATIONS["string"], image_layout="openai")


def test_a_template_is_found_in_the_tokenizer_config_too(tmp_path: Path) -> None:
    config = {"chat_template": GLM_TEMPLATE, "eos_token": {"content": "<e>"}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    template = ChatTemplate.from_folder(tmp_path)
    assert template.source == GLM_TEMPLATE
    assert template.tokens == {"eos_token": "<e>"}


def test_a_folder_without_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"chat_template\.jinja is not in"):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer_config.json", b"{"), ("tokenizer_config.json", b"[]"), ("chat_template.jinja", b"\xff\xfe")],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        ChatTemplate.from_folder(tmp_path)
